"""Deployment: exports the small model of a run, verifies it, and writes it in the forms that others load.

`export.py` is the door. Files here build on one another in this order: compaction, card, folder, onnx_file, compiled,
speed, semi_structured, source, onnx_table, quantise, demo, hub, predict, command.
"""
