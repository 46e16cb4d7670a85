"""Attention and MLP classes as data: which of a module's tensors its heads or neurons share, and how.

    branch = BRANCHES[class_name(module)]
    units = branch.units(module, "blocks.0.attn.", 0)            # pruning.units.Units

A module comes in; its `Units` go out, and what those of them give that hear nothing. A new class is one line in
`BRANCHES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from models.merging import merged_tokens, token_counts
from pruning.units import Layout, Reader, Tap, Units, unit_weights

# Where a plain ViT's Attention and Mlp come from; others compute something else with the same layers.
PLAIN_MODULES = ("models.vit", "timm.layers.attention", "timm.layers.mlp", "timm.models.vision_transformer")


def class_name(module: nn.Module) -> str:
    """Where a module's class is defined, such as "timm.models.eva.EvaAttention"."""
    return f"{type(module).__module__}.{type(module).__name__}"


# ------------------------------------------------------------------------------------------ heads


def head_dim(attn: nn.Module) -> int:
    return attn.head_dim if hasattr(attn, "head_dim") else round(attn.scale**-2)  # timm's BEiT keeps it only there


def _set_heads(attn: nn.Module, count: int) -> None:
    attn.head_dim = head_dim(attn)
    attn.num_heads, attn.attn_dim = count, count * attn.head_dim
    if hasattr(attn, "num_kv_heads"):
        attn.num_kv_heads, attn.kv_dim = count, attn.attn_dim
    if hasattr(attn, "in_split"):
        attn.in_split = [attn.in_split[0], *3 * [attn.attn_dim]]
    if count == 0 and hasattr(attn, "fused_attn"):
        attn.fused_attn = False  # timm's fused path dies on no heads at all under torch 2.9


def _queries_keys_values(attn: nn.Module, x: Tensor) -> Tensor:
    from models.narrow import queries_keys_values  # needs timm, as the module that is looked at

    return queries_keys_values(attn, x)


def _silent_heads(attn: nn.Module, deaf: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    # q and k only choose where v is read: without v's rows a head gives v's bias, but for a gate
    gated = getattr(attn, "gate", None) is not None
    return deaf[-1] & ~bias[-1].any(1) if gated else deaf[-1], bias[-1]


# ------------------------------------------------------------------------------------------ neurons


def _set_parallel_neurons(block: nn.Module, count: int) -> None:
    block.in_split = [count, *block.in_split[1:]]


def _hidden_of_parallel(block: nn.Module, x: Tensor) -> Tensor:
    return block.in_proj(block.in_norm(x))[..., : block.in_split[0]] + block.mlp_bias


def _both_inputs(mlp: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([mlp.fc1_g(x), mlp.fc1_x(x)], dim=-1)


def _silent_neurons(mlp: nn.Module, deaf: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return deaf[0], getattr(mlp, "mlp_act", getattr(mlp, "act", None))(bias[0])


def _silent_gated_neurons(mlp: nn.Module, deaf: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    gate = 1 if getattr(mlp, "gate_last", False) else 0
    opening, value = mlp.act(bias[gate]), bias[1 - gate]
    shut = (deaf[gate] & ~opening.any(1)) | (deaf[1 - gate] & ~value.any(1))
    return shut | deaf.all(0), opening * value


# ------------------------------------------------------------------------------------------ a class


@dataclass(frozen=True)
class Branch:
    """What the units of one attention or MLP class own.

    Layers and tensors that a module does not have, or has as None, are skipped: a class that can hold its queries, keys
    and values in one layer or in three names both ways.

    Attributes:
        inputs: layers whose rows are the units', and how many streams (q, k and v) each has; weight criteria score
            their weights.
        output: the layer whose columns are the units'; the first one that there is.
        count: how many units a module has.
        silent: (module, deaf [streams, count], bias [streams, count, width]) to which units give the same whatever they
            see, [count], and what, [count, width]; deaf: the rows are zero.
        gates: more layers whose rows are the units', not scored.
        loose: tensors by their own name, as (dim, the stream that they are the bias of, or None).
        followers: buffers whose first dimension is the units'.
        norm: what stands between the units and `output` and counts all of them.
        ends: which end of `inputs`, and of the first of `output`, is the units' where other units have the other.
        seen: (module, its input) to where l1 and l2 look, where no layer of the module is called for just that.
        tell: (module, count) notes how many units are left, where the module itself counts them.
        narrow: the class of models/narrow.py that works with any number of units, where the class itself does not.
    """

    kind: str
    inputs: Mapping[str, int]
    output: tuple[str, ...]
    count: Callable[[nn.Module], int]
    silent: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    gates: Mapping[str, int] = field(default_factory=dict)
    loose: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    followers: tuple[str, ...] = ()
    norm: str = "norm"
    ends: tuple[str, str] = ("", "")
    seen: Callable[[nn.Module, Tensor], Tensor] | None = None
    tell: Callable[[nn.Module, int], None] | None = None
    narrow: str | None = None

    def width(self, module: nn.Module) -> int:
        return head_dim(module) if self.kind == "head" else 1

    def output_name(self, module: nn.Module) -> str:
        return next(name for name in self.output if getattr(module, name, None) is not None)

    def norm_between(self, module: nn.Module) -> nn.Module | None:
        norm = getattr(module, self.norm, None)
        return None if isinstance(norm, nn.Identity) else norm

    def units(self, module: nn.Module, prefix: str, layer: int) -> Units:
        """The units of one module; `prefix` is what its parameters' names start with."""
        count, width = self.count(module), self.width(module)
        parts = {}
        for name, streams in _present(module, self.inputs | self.gates):
            for tensor, _ in getattr(module, name).named_parameters():
                parts[f"{prefix}{name}.{tensor.removesuffix('_orig')}"] = Layout(0, streams, count, width, self.ends[0])
        for name, (dim, stream) in _present(module, self.loose):
            parts[f"{prefix}{name}"] = Layout(dim, 1, count, 1 if stream is None else width)
        norm = self.norm_between(module)
        for tensor, _ in () if norm is None else norm.named_parameters():
            parts[f"{prefix}{self.norm}.{tensor}"] = Layout(0, 1, count, width)
        output = self.output_name(module)
        end = self.ends[1] if output == self.output[0] else ""
        parts[f"{prefix}{output}.weight"] = Layout(1, 1, count, width, end)
        buffers = dict.fromkeys(self.followers, Layout(0, 1, count, width))
        return Units(
            self.kind,
            layer,
            count,
            parts,
            output=self._seen(module, prefix, count, width),
            contribution=Tap(f"{prefix}{output}", "input", Layout(-1, 1, count, width, end)),
            followers={f"{prefix}{name}": layout for name, layout in _present(module, buffers)},
            resize=self.resize,
            macs=unit_macs,
            listed=self.kind == "head",
            weights=tuple(f"{prefix}{name}.weight" for name, _ in _present(module, self.inputs)),
            module=prefix.removesuffix("."),
            reader=Reader(
                f"{prefix}{output}",
                Layout(1, 1, count, width, end),
                norm=None if norm is None else f"{prefix}{self.norm}",
                gate=next((f"{prefix}{name}" for name, _ in _present(module, self.gates)), None),
            ),
        )

    def _seen(self, module: nn.Module, prefix: str, count: int, width: int) -> Tap:
        (name, streams), *others = _present(module, self.inputs)
        if self.seen is not None and (others or dict(_present(module, self.loose))):
            streams += sum(number for _, number in others)
            return Tap(prefix.removesuffix("."), "input", Layout(-1, streams, count, width), self.seen)
        return Tap(f"{prefix}{name}", "output", Layout(-1, streams, count, width, self.ends[0]))

    def resize(self, module: nn.Module, count: int) -> None:
        """Tell the module that `count` of its units are left."""
        tell = self.tell or (_set_heads if self.kind == "head" else None)
        if tell:
            tell(module, count)
        if self.narrow:
            _become(module, self.narrow)
        norm = self.norm_between(module)
        if norm is not None and norm.weight.shape != norm.normalized_shape:
            _become(norm, "NarrowLayerNorm")

    def silent_units(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Which units give the same whatever they see, [count], and what, [count, width], before any norm."""
        count, width = self.count(module), self.width(module)
        deaf, biases = [], []
        for name, streams in _present(module, self.inputs):
            layer, layout = getattr(module, name), Layout(0, streams, count, width, self.ends[0])
            deaf.append(~layout.split(layer.weight).flatten(2).any(2))
            constant = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
            biases.append(layout.split(constant))
        bias = torch.cat(biases)
        for name, (_, stream) in _present(module, self.loose):
            if stream is not None:
                bias[stream] += getattr(module, name).unflatten(0, (count, width))
        return self.silent(module, torch.cat(deaf), bias)


Branches = Iterable[tuple[str, nn.Module, Branch]]  # units key, module, what its units own


def _present(module: nn.Module, names: Mapping) -> Iterator[tuple]:
    return ((name, value) for name, value in names.items() if getattr(module, name, None) is not None)


def _become(module: nn.Module, name: str) -> None:
    from models import narrow

    module.__class__ = getattr(narrow, name)


def unit_macs(model: nn.Module, group: Units) -> int:
    """Forward multiply-accumulates per image that go with one unit (N tokens, width d, embedding D).

    A head costs N d D for each of q, k, v and the projection, and 2 N^2 d for its attention; a neuron 2 N D. Gates are
    one more layer of each. N is what the unit's layer sees where tokens merge on the way.
    """
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    if merged_tokens(model):
        tokens = token_counts(model)[group.layer][group.kind == "neuron"]
    attention = 2 * tokens * tokens * group.contribution.layout.width if group.kind == "head" else 0
    return tokens * unit_weights(model, group) + attention


# ------------------------------------------------------------------------------------------ the classes

HEADS = Branch(
    "head",
    inputs={"qkv": 3, "q_proj": 1, "k_proj": 1, "v_proj": 1},
    output=("proj",),
    count=lambda attn: attn.num_heads,
    silent=_silent_heads,
    gates={"gate": 1},
    seen=_queries_keys_values,
)
ROPE_HEADS = replace(HEADS, narrow="NarrowAttentionRope")
EVA_HEADS = replace(
    HEADS, loose={"q_bias": (0, 0), "v_bias": (0, 2)}, followers=("k_bias",), narrow="NarrowEvaAttention"
)
BEIT_HEADS = replace(
    EVA_HEADS, loose=EVA_HEADS.loose | {"relative_position_bias_table": (1, None)}, narrow="NarrowBeitAttention"
)
NEURONS = Branch(
    "neuron", inputs={"fc1": 1}, output=("fc2",), count=lambda mlp: mlp.fc2.in_features, silent=_silent_neurons
)
GATED_NEURONS = replace(
    NEURONS, inputs={"fc1": 2, "fc1_g": 1, "fc1_x": 1}, silent=_silent_gated_neurons, seen=_both_inputs
)
PARALLEL_HEADS = replace(
    HEADS,
    inputs={"in_proj": 3},
    output=("out_proj", "attn_out_proj"),
    gates={},
    ends=("back", "front"),
    seen=None,
    narrow="NarrowParallelScalingBlock",
)
PARALLEL_NEURONS = replace(
    NEURONS,
    inputs={"in_proj": 1},
    output=("out_proj", "mlp_out_proj"),
    count=lambda block: block.in_split[0],
    loose={"mlp_bias": (0, 0)},
    ends=("front", "back"),
    seen=_hidden_of_parallel,
    tell=_set_parallel_neurons,
    narrow="NarrowParallelScalingBlock",
)

BRANCHES: dict[str, Branch] = {
    **{f"{place}.Attention": HEADS for place in PLAIN_MODULES},
    **{f"{place}.Mlp": NEURONS for place in PLAIN_MODULES},
    "timm.layers.attention.AttentionRope": ROPE_HEADS,
    "models.narrow.NarrowAttentionRope": ROPE_HEADS,
    "timm.models.eva.EvaAttention": EVA_HEADS,
    "models.narrow.NarrowEvaAttention": EVA_HEADS,
    "timm.models.beit.Attention": BEIT_HEADS,
    "models.narrow.NarrowBeitAttention": BEIT_HEADS,
    "timm.layers.mlp.GluMlp": GATED_NEURONS,
    "timm.layers.mlp.SwiGLU": GATED_NEURONS,
}
PARALLEL_BLOCKS = ("timm.models.vision_transformer.ParallelScalingBlock", "models.narrow.NarrowParallelScalingBlock")
