"""The Vision Transformer that runs of the whole command train in tests: `--arch vit_micro`."""

import math
import zlib
from types import SimpleNamespace

import numpy as np

import main_imp_fillback as entry
from models.vit import VisionTransformer

DIM, DEPTH, HEADS, HEAD_DIM, HIDDEN, TOKENS = 24, 2, 4, 6, 48, 5


def vit_micro(num_classes=None, img_size=None, **overrides):
    geometry = {"img_size": img_size or 16, "patch_size": 8, "num_classes": num_classes or 10, "embed_dim": DIM}
    return VisionTransformer(**{**geometry, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2, **overrides})


def masks_of(checkpoint, name):
    """The 0/1 masks of a set in a checkpoint, flat; equal sets are stored once, as the other's name."""
    packed = checkpoint["run"][name]
    if isinstance(packed, str):
        return masks_of(checkpoint, packed)
    inflated = {layer: zlib.decompress(mask["bits"].numpy().tobytes()) for layer, mask in packed.items()}
    bits = {layer: np.frombuffer(content, dtype=np.uint8) for layer, content in inflated.items()}
    return {layer: np.unpackbits(bits[layer], count=math.prod(mask["shape"])) for layer, mask in packed.items()}


def call(argv):
    """Exit code of the command, in process."""
    try:
        return entry.main([str(part) for part in argv])
    except SystemExit as stop:
        return stop.code


def runner(tmp_path, capsys, base):
    """run("--struct", "imp", name="a") -> what the command, with the flags `base`, did and left in tmp_path/a."""

    def run(*flags, name="run", base=base, code=0):
        folder = tmp_path / name
        capsys.readouterr()
        found = call([*base, "--save_dir", folder, *flags])
        out, err = capsys.readouterr()
        assert found == code, err
        return SimpleNamespace(dir=folder, out=out, err=err)

    return run
