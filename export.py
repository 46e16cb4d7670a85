#!/usr/bin/env python
"""Exports the small model that a run ends with, verifies that it computes what the masked one does, and loads it.

    python export.py results/NAME                              writes results/NAME/model/
    python export.py results/NAME --predict photo.jpg images/  class names and probabilities; --out FILE.csv keeps them
    python export.py results/NAME --onnx --latency             and model.onnx, and a table of speeds
    python export.py results/NAME --fold --torch_export        a variant for inference, and model.pt2
    python export.py results/NAME --onnx --int8                8-bit weights, and a table of what they cost and save
    python export.py results/NAME --demo                       a web page that shows the model
    python export.py results/NAME --hf DIR                     a folder for the Hugging Face hub
    python export.py results/NAME --evaluate                   accuracy on the run's test images
    python export.py results/NAME/model --onnx                 from the exported model alone, without its data set
    python export.py --from_checkpoint model.pth.tar --arch vit_small --out model

`model/` holds model.safetensors, config.json, parity.json and a model card. `export.load("results/NAME")` gives the
model back; the card shows how plain timm does. No file holds pickled code. Calls add to one another: what was made from
the same weights stays.
"""

from __future__ import annotations

import os
import sys

# PyTorch's CPU threads spin for one another: beside another busy process a step took 5.2 s, with this 0.8 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from deployment.card import model_card
from deployment.command import main
from deployment.compaction import compact, macs, parity
from deployment.compiled import aot_package, compiled, torch_export
from deployment.demo import class_names
from deployment.exported import check_folder, describe, load, read_config, verification_line, write, write_folded
from deployment.onnx_file import check_onnx, to_onnx
from deployment.predict import image_files, predict
from deployment.semi_structured import semi_structured_
from deployment.source import run_provenance
from deployment.speed import latency_table, size_table, throughput
from engine.evaluation import accuracy
from families.cards import LOADING_SNIPPETS

__all__ = [
    "LOADING_SNIPPETS",
    "accuracy",
    "aot_package",
    "check_folder",
    "check_onnx",
    "class_names",
    "compact",
    "compiled",
    "describe",
    "image_files",
    "latency_table",
    "load",
    "macs",
    "main",
    "model_card",
    "parity",
    "predict",
    "verification_line",
    "read_config",
    "run_provenance",
    "semi_structured_",
    "size_table",
    "throughput",
    "to_onnx",
    "torch_export",
    "write",
    "write_folded",
]

if __name__ == "__main__":
    sys.exit(main())
