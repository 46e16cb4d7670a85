"""Deployment: the small model where it is used. The masked model of a run comes in; proven, on disk, fast, goes out.

`export.py` is the door. Files here build on one another in this order: compaction, card, folder, onnx_file, compiled,
speed, semi_structured, source, onnx_table, quantise, demo, hub, predict, command.
"""
