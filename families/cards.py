"""The lines of a model card that load a removed Vision Transformer with timm alone.

    lines = loading_lines(config)                               # config.json of an exported model, as a mapping

What differs from a plain ViT is noted by `traits_of` when the model is described, so that the card needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from families.parts import BRANCHES, PARALLEL_BLOCKS, class_name

# Plain attention and plain MLPs: layers of the right size in place of the others.
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
    # the stem gives one pixel per patch
    "stem": _SNIPPET.format(
        build="""\
stem = nn.Sequential(*(timm.layers.ConvNormAct(*channels, kernel_size=3, stride=2) for channels in config["stem"]))
model = timm.models.vision_transformer.VisionTransformer(
    **config["vit"] | {"patch_size": 1}, embed_layer=lambda **sizes: timm.layers.HybridEmbed(stem, **sizes)
)"""
    ),
}
# The factors at the end of branches are in the weights before them.
_FOLDED = """
for name in config["folded"]:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Identity() if leaf.startswith("ls") else None)"""

# Any class of attention and MLP: every tensor as small as it was saved, and the attention told its heads.
_BY_SHAPE = """\
import json
import timm
{imports}from safetensors.torch import load_file
from torch import nn
{classes}
with open("config.json") as file:
    config = json.load(file)
model, weights = timm.create_model(**config["timm"]), load_file("model.safetensors"){folded}
for name, tensor in weights.items():
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if getattr(layer, leaf).shape != tensor.shape:
        setattr(layer, leaf, nn.Parameter(tensor)){norms}
{attentions}
for attn, heads in zip(attentions, config["heads"]):
    attn.num_heads = attn.num_kv_heads = heads
    attn.attn_dim, attn.fused_attn = heads * config["head_dim"], heads > 0{swap}
model.load_state_dict(weights){after}
model.eval()
"""
_PLAIN = {
    "imports": "",
    "folded": "",
    "classes": "",
    "norms": "",
    "attentions": 'attentions = [module for name, module in model.named_modules() if name.endswith(".attn")]',
    "swap": "",
    "after": "",
}
_BIAS = """
for attn in attentions if attentions[0].q_bias is not None else ():
    attn.qkv.bias = nn.Parameter(torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias]))"""
# What a trait puts into the places of `_BY_SHAPE`. timm's EvaAttention, BEiT's and ParallelScalingBlock take the width
# of the tokens for that of their heads; AttentionRope and Attention compute the same without that.
_TRAITS = {
    "EvaAttention": {
        "imports": "import torch\n",
        "swap": """
    attn.__class__, attn.num_kv_groups = timm.layers.AttentionRope, 1""",
        "after": _BIAS,
    },
    "mixed RoPE": {  # its frequencies keep their number; those of the heads that are left come first
        "classes": """

def rope_of_heads(attn, args, options):
    return args, {**options, "rope": options["rope"][: attn.num_heads]}

""",
        "swap": """
    attn.register_forward_pre_hook(rope_of_heads, with_kwargs=True)""",
    },
    "BeitAttention": {
        "imports": "import torch\n",
        "classes": """

class NarrowAttention(timm.layers.Attention):
    def forward(self, x, shared_rel_pos_bias=None):
        index = self.relative_position_index
        bias = self.relative_position_bias_table[index.flatten()].unflatten(0, index.shape)
        return super().forward(x, attn_mask=bias.permute(2, 0, 1)[None])

""",
        "swap": """
    attn.q_norm = attn.k_norm = attn.norm = nn.Identity()
    attn.__class__, attn.head_dim, attn.gate = NarrowAttention, config["head_dim"], None""",
        "after": _BIAS,
    },
    "ParallelScalingBlock": {
        "imports": "import torch\n",
        "classes": """

class NarrowBlock(timm.models.vision_transformer.ParallelScalingBlock):
    def forward(self, x):
        hidden, qkv = self.in_proj(self.in_norm(x)).tensor_split([len(self.in_proj.weight) - 3 * self.attn_dim], dim=-1)
        hidden = self.mlp_act(hidden if self.mlp_bias is None else hidden + self.mlp_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        scores = self.scale * self.q_norm(q) @ self.k_norm(k).transpose(-2, -1)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        if self.out_proj is None:
            return x + self.ls(self.attn_out_proj(attended) + self.mlp_out_proj(hidden))
        return x + self.ls(self.out_proj(torch.cat([attended, hidden], dim=-1)))

""",
        "attentions": "attentions = list(model.blocks)",
        "swap": """
    attn.__class__ = NarrowBlock""",
    },
    "LayerNorm": {
        "classes": """

class NarrowNorm(nn.LayerNorm):  # what is gone was zeros, and mean and variance count them
    def forward(self, x):
        padded = nn.functional.pad(x, (0, self.normalized_shape[0] - x.shape[-1]))
        norm = nn.functional.layer_norm(padded, self.normalized_shape, eps=self.eps)
        return norm[..., : x.shape[-1]] * self.weight + self.bias

""",
        "norms": """
        if isinstance(layer, nn.LayerNorm):
            layer.__class__ = NarrowNorm""",
    },
}

MERGING_CARD = """\
## Loading it with its token merging

```python
import export  # of the program that wrote this folder

model = export.load("{folder}")
```

What is said above holds for this model. The same weights work without merging, as plain timm loads them below: each
block then sees all tokens, which costs more, and the logits are others, as the {count} tokens a block that merged in
training are averages no more; its accuracy has to be measured.

"""


def traits_of(model: nn.Module) -> dict[str, list[str]]:
    """{"modules": what a loader has to know besides the timm name}; nothing for plain attention and plain MLPs."""
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


def loading_lines(config: Mapping) -> str:
    """The snippet for an exported model's config.json."""
    folded = _FOLDED if "folded" in config else ""
    if "modules" not in config:
        plain = LOADING_SNIPPETS[next(key for key in ("stem", "vit", "timm") if key in config)]
        return plain.replace("\nfor block,", f"{folded}\nfor block,")
    places = {**_PLAIN, "folded": folded}
    for name in config["modules"]:
        for place, text in _TRAITS.get(name, {}).items():
            places[place] = text if place in ("imports", "attentions") else places[place] + text
    return _BY_SHAPE.format(**places)
