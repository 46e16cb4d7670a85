"""How a model card says to load an exported transformer: a few lines of plain timm, or a file beside the card.

    text = loading_section(config)                               # config.json of an exported model, as a mapping
    needs_loader(config)                                         # whether load_model.py has to be in the folder

`traits_of` notes what differs from a plain ViT when the model is described, so that the card needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from families.parts import BRANCHES, PARALLEL_BLOCKS, class_name

LOADER = "load_model.py"  # beside the weights: a copy of this file of the program
LOADER_SOURCE = Path(__file__).parent.parent / "models" / "narrow.py"

_READ_CONFIG = """\
import json
import timm
from safetensors.torch import load_file
from torch import nn

with open("config.json") as file:
    config = json.load(file)
"""
_BUILD = {
    "vit": """\
model = timm.models.vision_transformer.VisionTransformer(**config["vit"])
""",
    "timm": """\
model = timm.create_model(**config["timm"])
""",
    # the stem gives one pixel per patch
    "stem": """\
stem = nn.Sequential(*(timm.layers.ConvNormAct(*channels, kernel_size=3, stride=2) for channels in config["stem"]))
model = timm.models.vision_transformer.VisionTransformer(
    **config["vit"] | {"patch_size": 1}, embed_layer=lambda **sizes: timm.layers.HybridEmbed(stem, **sizes)
)
""",
}
# The factors at the end of branches are multiplied into the weights before them.
_UNFOLD = """\
for name in config["folded"]:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Identity() if leaf.startswith("ls") else None)
"""
_PLAIN_BLOCKS = """\
for block, heads, neurons in zip(model.blocks, config["heads"], config["neurons"]):
    attn, mlp, width = block.attn, block.mlp, heads * config["head_dim"]
    dim, bias = attn.proj.out_features, attn.qkv.bias is not None
    attn.num_heads, attn.attn_dim, attn.fused_attn = heads, width, heads > 0
    attn.qkv, attn.proj = nn.Linear(dim, 3 * width, bias=bias), nn.Linear(width, dim)
    mlp.fc1, mlp.fc2 = nn.Linear(dim, neurons), nn.Linear(neurons, dim)
"""
_LOAD_WEIGHTS = """\
model.load_state_dict(load_file("model.safetensors"))
model.eval()
"""
_SWIN = """\
model, weights = timm.create_model(**config["swin"]), load_file("model.safetensors")
for name, tensor in weights.items():
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))
for attn, heads in zip((block.attn for stage in model.layers for block in stage.blocks), config["heads"]):
    attn.num_heads = heads
"""
LOADING_SNIPPETS = {key: _READ_CONFIG + build + _PLAIN_BLOCKS + _LOAD_WEIGHTS for key, build in _BUILD.items()}
LOADING_SNIPPETS["swin"] = _READ_CONFIG + _SWIN + _LOAD_WEIGHTS

_BY_TIMM = """\
## Loading it with timm alone

```python
{snippet}```
"""
_BY_FILE = """\
## Loading it with timm and load_model.py

`load_model.py`, beside this card, has the attention that timm lacks at this width. It needs timm, torch and safetensors
and nothing of the program that wrote this folder.

```python
from load_model import load_model

model = load_model(".")
```
"""
_MERGING = """\
## Loading it with its token merging

```python
import export  # of the program that wrote this folder

model = export.load("{folder}")
```

What is said above holds for this model. The same weights work without merging, loaded as below: each block then sees
all tokens, which costs more, and the logits differ, since the {count} tokens a block that merged in training are no
longer averaged; its accuracy has to be measured.

"""


def traits_of(model: nn.Module) -> dict[str, list[str]]:
    """{"modules": what differs from plain attention and plain MLPs}; empty where nothing does."""
    found = {"parallel" for block in model.blocks if hasattr(block, "attns")}
    found |= {"mixed RoPE"} if getattr(model, "rope_mixed", False) else set()
    for module in model.modules():
        name = class_name(module)
        if name in BRANCHES or name in PARALLEL_BLOCKS or name == "models.narrow.NarrowLayerNorm":
            beit = name == "timm.models.beit.Attention"
            found.add("BeitAttention" if beit else type(module).__name__.removeprefix("Narrow"))
            found |= {"gate"} if getattr(module, "gate", None) is not None else set()
    special = sorted(found - {"Attention", "Mlp"})
    return {"modules": special} if special else {}


def needs_loader(config: Mapping) -> bool:
    """Whether timm's own classes cannot compute an exported transformer with the heads that it has left."""
    return "modules" in config or ("swin" in config and (config["version"] == 2 or 0 in config["heads"]))


def loading_section(config: Mapping) -> str:
    """The sections of the card about loading an exported transformer."""
    section = _BY_FILE
    if not needs_loader(config):
        snippet = LOADING_SNIPPETS[next(key for key in ("stem", "vit", "timm", "swin") if key in config)]
        if "folded" in config:
            snippet = snippet.replace(_PLAIN_BLOCKS, _UNFOLD + _PLAIN_BLOCKS)
        section = _BY_TIMM.format(snippet=snippet)
    if "token_merge" in config:
        folder = "model/folded" if "folded" in config else "model"
        section = _MERGING.format(count=config["token_merge"], folder=folder) + section
    return section
