"""The lines of a model card that load a removed Vision Transformer with timm alone.

    lines = loading_lines(config)                               # config.json of an exported model, as a mapping

What differs from a plain ViT is noted by `traits_of` when the model is described, so that the card needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from families.parts import BRANCHES, class_name

_SNIPPET = """\
import json
import timm
from safetensors.torch import load_file
from torch import nn

with open("config.json") as file:
    config = json.load(file)
{build}
for block, heads, neurons in zip(model.blocks, config["heads"], config["neurons"]):
    attn, mlp, width = block.attn, block.mlp, heads * config["head_dim"]
    dim, bias = attn.proj.out_features, attn.qkv.bias is not None
    attn.num_heads, attn.attn_dim, attn.fused_attn = heads, width, heads > 0
    attn.qkv, attn.proj = nn.Linear(dim, 3 * width, bias=bias), nn.Linear(width, dim)
    mlp.fc1, mlp.fc2 = nn.Linear(dim, neurons), nn.Linear(neurons, dim)
model.load_state_dict(load_file("model.safetensors"))
model.eval()
"""
LOADING_SNIPPETS = {
    "vit": _SNIPPET.format(build='model = timm.models.vision_transformer.VisionTransformer(**config["vit"])'),
    "timm": _SNIPPET.format(build='model = timm.create_model(**config["timm"])'),
}

# Any class of attention and MLP: every tensor as small as it was saved, and the attention told its heads.
_BY_SHAPE = """\
import json
import timm
{imports}from safetensors.torch import load_file
from torch import nn
{classes}
with open("config.json") as file:
    config = json.load(file)
model, weights = timm.create_model(**config["timm"]), load_file("model.safetensors")
for name, tensor in weights.items():
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if getattr(layer, leaf).shape != tensor.shape:
        setattr(layer, leaf, nn.Parameter(tensor)){norms}
attentions = [module for name, module in model.named_modules() if name.endswith(".attn")]
for attn, heads in zip(attentions, config["heads"]):
    attn.num_heads = attn.num_kv_heads = heads
    attn.attn_dim, attn.fused_attn = heads * config["head_dim"], heads > 0{swap}
model.load_state_dict(weights){after}
model.eval()
"""
_NORM_CLASS = """

class NarrowNorm(nn.LayerNorm):  # what is gone was zeros, and mean and variance count them
    def forward(self, x):
        padded = nn.functional.pad(x, (0, self.normalized_shape[0] - x.shape[-1]))
        norm = nn.functional.layer_norm(padded, self.normalized_shape, eps=self.eps)
        return norm[..., : x.shape[-1]] * self.weight + self.bias

"""
_NORMS = """
        if isinstance(layer, nn.LayerNorm):
            layer.__class__ = NarrowNorm"""
# EvaAttention takes its width for that of the tokens; AttentionRope is the same without that, and without loose biases.
_EVA = """
    attn.__class__, attn.num_kv_groups = timm.layers.AttentionRope, 1"""
_EVA_BIAS = """
for attn in attentions if attentions[0].q_bias is not None else ():
    attn.qkv.bias = nn.Parameter(torch.cat([attn.q_bias, attn.k_bias[: len(attn.q_bias)], attn.v_bias]))"""


def traits_of(model: nn.Module) -> dict:
    """What a loader has to know of a model besides its timm name: nothing for plain attention and plain MLPs."""
    classes = {type(module).__name__.removeprefix("Narrow") for module in model.modules() if _is_known(module)}
    classes |= {type(block).__name__.removeprefix("Narrow") for block in model.blocks if hasattr(block, "in_split")}
    classes |= {"LayerNorm" for module in model.modules() if type(module).__name__ == "NarrowLayerNorm"}
    if any(getattr(module, "gate", None) is not None for module in model.modules()):
        classes.add("gate")
    classes |= {"parallel" for block in model.blocks if hasattr(block, "attns")}
    special = sorted(classes - {"Attention", "Mlp"})
    return {"modules": special} if special else {}


def _is_known(module: nn.Module) -> bool:
    return class_name(module) in BRANCHES


def loading_lines(config: Mapping) -> str:
    """The snippet for an exported model's config.json."""
    modules = config.get("modules", ())
    if "vit" in config or not modules:
        return LOADING_SNIPPETS["vit" if "vit" in config else "timm"]
    eva, norm = "EvaAttention" in modules, "LayerNorm" in modules
    return _BY_SHAPE.format(
        imports="import torch\n" if eva else "",
        classes=_NORM_CLASS if norm else "",
        norms=_NORMS if norm else "",
        swap=_EVA if eva else "",
        after=_EVA_BIAS if eva else "",
    )
