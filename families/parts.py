"""Attention and MLP classes as data: which rows and columns of a module's tensors belong to one head or neuron.

    branch = BRANCHES[class_name(module)]
    units = branch.units(module, "blocks.0.attn.", 0)            # pruning.units.Units

A new class of attention or MLP is one `Branch` in `BRANCHES`.
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
    from models.narrow import queries_keys_values  # imports timm

    return queries_keys_values(attn, x)


def _constant_heads(attn: nn.Module, zero: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    # softmax weights sum to 1: without weights in v a head's output is v's bias, unless a gate multiplies it
    gated = getattr(attn, "gate", None) is not None
    return zero[-1] & ~bias[-1].any(1) if gated else zero[-1], bias[-1]


# ------------------------------------------------------------------------------------------ neurons


def _set_parallel_neurons(block: nn.Module, count: int) -> None:
    block.in_split = [count, *block.in_split[1:]]


def _hidden_of_parallel(block: nn.Module, x: Tensor) -> Tensor:
    return block.in_proj(block.in_norm(x))[..., : block.in_split[0]] + block.mlp_bias


def _both_inputs(mlp: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([mlp.fc1_g(x), mlp.fc1_x(x)], dim=-1)


def _constant_neurons(mlp: nn.Module, zero: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    act = mlp.mlp_act if hasattr(mlp, "mlp_act") else mlp.act
    return zero[0], act(bias[0])


def _constant_gated_neurons(mlp: nn.Module, zero: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    gate = 1 if getattr(mlp, "gate_last", False) else 0
    factor, value = mlp.act(bias[gate]), bias[1 - gate]
    is_zero = (zero[gate] & ~factor.any(1)) | (zero[1 - gate] & ~value.any(1))
    return is_zero | zero.all(0), factor * value


# ------------------------------------------------------------------------------------------ a class


@dataclass(frozen=True)
class Branch:
    """Where the units (heads or neurons) of one attention or MLP class are found in its tensors.

    Layers and tensors that a module lacks, or has as None, are skipped, so one entry serves a class that holds queries,
    keys and values in one layer (`qkv`) or in three. Plain attention, with `num_heads` heads of `head_dim` values over
    tokens of D channels, is

        Branch(
            "head",
            inputs={"qkv": 3},                  # weight [3 * num_heads * head_dim, D]: rows of q, then k, then v
            output=("proj",),                   # weight [D, num_heads * head_dim]
            count=lambda attn: attn.num_heads,
            constant=_constant_heads,
            set_count=_set_heads,
        )

    With 3 heads of 64 values, head 1 owns rows 64..127 (q), 256..319 (k) and 448..511 (v) of `qkv.weight`, the same
    entries of `qkv.bias`, and columns 64..127 of `proj.weight`.

    Attributes:
        kind: "head" or "neuron".
        inputs: {layer whose rows belong to the units: streams in it, such as 3 for q, k and v}. Weight criteria score
            these weights.
        output: the layer whose columns belong to the units; of several names the first that the module has.
        count: module -> how many units it has.
        constant: (module, zero [streams, count], bias [streams, count, width]) -> which units have an output that does
            not depend on the input, [count], and that output, [count, width]. `zero` marks units whose rows in
            `inputs` are all zero.
        gates: as `inputs`, for layers that weight criteria do not score.
        tensors: {parameter outside of any layer: (dimension of the units, the stream whose bias it is or None)}.
        followers: buffers whose first dimension is the units'.
        norm: name of a norm between the units and `output`.
        sides: "front" or "back" of `inputs`, and of the first of `output`, where these also hold units of the other
            kind; "" where all of it belongs to these units.
        activation: (module, its input) -> what the criteria l1 and l2 see, where no single layer outputs it.
        set_count: (module, count): stores the number of units in the module's own attributes.
        narrow_class: class of `models.narrow` that works with any number of units, where the module's own does not.
    """

    kind: str
    inputs: Mapping[str, int]
    output: tuple[str, ...]
    count: Callable[[nn.Module], int]
    constant: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    gates: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    followers: tuple[str, ...] = ()
    norm: str = "norm"
    sides: tuple[str, str] = ("", "")
    activation: Callable[[nn.Module, Tensor], Tensor] | None = None
    set_count: Callable[[nn.Module, int], None] | None = None
    narrow_class: str | None = None

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
                parts[f"{prefix}{name}.{tensor.removesuffix('_orig')}"] = Layout(
                    0, streams, count, width, self.sides[0]
                )
        for name, (dim, stream) in _present(module, self.tensors):
            parts[f"{prefix}{name}"] = Layout(dim, 1, count, 1 if stream is None else width)
        norm = self.norm_between(module)
        for tensor, _ in () if norm is None else norm.named_parameters():
            parts[f"{prefix}{self.norm}.{tensor}"] = Layout(0, 1, count, width)
        output = self.output_name(module)
        side = self.sides[1] if output == self.output[0] else ""
        parts[f"{prefix}{output}.weight"] = Layout(1, 1, count, width, side)
        buffers = dict.fromkeys(self.followers, Layout(0, 1, count, width))
        return Units(
            self.kind,
            layer,
            count,
            parts,
            output=self._activation_tap(module, prefix, count, width),
            contribution=Tap(f"{prefix}{output}", "input", Layout(-1, 1, count, width, side)),
            followers={f"{prefix}{name}": layout for name, layout in _present(module, buffers)},
            resize=self.resize,
            macs=unit_macs,
            listed=self.kind == "head",
            weights=tuple(f"{prefix}{name}.weight" for name, _ in _present(module, self.inputs)),
            module=prefix.removesuffix("."),
            reader=Reader(
                f"{prefix}{output}",
                Layout(1, 1, count, width, side),
                norm=None if norm is None else f"{prefix}{self.norm}",
                gate=next((f"{prefix}{name}" for name, _ in _present(module, self.gates)), None),
            ),
        )

    def _activation_tap(self, module: nn.Module, prefix: str, count: int, width: int) -> Tap:
        (name, streams), *others = _present(module, self.inputs)
        if self.activation is not None and (others or dict(_present(module, self.tensors))):
            streams += sum(number for _, number in others)
            return Tap(prefix.removesuffix("."), "input", Layout(-1, streams, count, width), self.activation)
        return Tap(f"{prefix}{name}", "output", Layout(-1, streams, count, width, self.sides[0]))

    def resize(self, module: nn.Module, count: int) -> None:
        """Store in the module that `count` of its units are left, and give it a class that works with so many."""
        if self.set_count:
            self.set_count(module, count)
        if self.narrow_class:
            _become(module, self.narrow_class)
        norm = self.norm_between(module)
        if norm is not None and norm.weight.shape != norm.normalized_shape:
            _become(norm, "NarrowLayerNorm")

    def constant_units(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Which units have an output that does not depend on the input, [count], and that output, [count, width],
        before any norm."""
        count, width = self.count(module), self.width(module)
        zero, biases = [], []
        for name, streams in _present(module, self.inputs):
            layer, layout = getattr(module, name), Layout(0, streams, count, width, self.sides[0])
            zero.append(~layout.split(layer.weight).flatten(2).any(2))
            values = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
            biases.append(layout.split(values))
        bias = torch.cat(biases)
        for name, (_, stream) in _present(module, self.tensors):
            if stream is not None:
                bias[stream] += getattr(module, name).unflatten(0, (count, width))
        return self.constant(module, torch.cat(zero), bias)


Branches = Iterable[tuple[str, nn.Module, Branch]]  # units key, module, where its units are


def _present(module: nn.Module, names: Mapping) -> Iterator[tuple]:
    return ((name, value) for name, value in names.items() if getattr(module, name, None) is not None)


def _become(module: nn.Module, name: str) -> None:
    from models import narrow

    module.__class__ = getattr(narrow, name)


def unit_macs(model: nn.Module, group: Units) -> int:
    """Forward multiply-accumulates per image of one unit (N tokens, width d, embedding D).

    A head costs N d D for each of q, k, v and the projection, and 2 N^2 d for its attention; a neuron 2 N D. Gates are
    one more layer of each. Where tokens merge, N is the number of tokens that the unit's layer sees.
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
    constant=_constant_heads,
    gates={"gate": 1},
    activation=_queries_keys_values,
    set_count=_set_heads,
)
ROPE_HEADS = replace(HEADS, narrow_class="NarrowAttentionRope")
EVA_HEADS = replace(
    HEADS, tensors={"q_bias": (0, 0), "v_bias": (0, 2)}, followers=("k_bias",), narrow_class="NarrowEvaAttention"
)
BEIT_HEADS = replace(
    EVA_HEADS,
    tensors={**EVA_HEADS.tensors, "relative_position_bias_table": (1, None)},
    narrow_class="NarrowBeitAttention",
)
NEURONS = Branch(
    "neuron", inputs={"fc1": 1}, output=("fc2",), count=lambda mlp: mlp.fc2.in_features, constant=_constant_neurons
)
GATED_NEURONS = replace(
    NEURONS, inputs={"fc1": 2, "fc1_g": 1, "fc1_x": 1}, constant=_constant_gated_neurons, activation=_both_inputs
)
PARALLEL_HEADS = replace(
    HEADS,
    inputs={"in_proj": 3},
    output=("out_proj", "attn_out_proj"),
    gates={},
    sides=("back", "front"),
    activation=None,
    narrow_class="NarrowParallelScalingBlock",
)
PARALLEL_NEURONS = replace(
    NEURONS,
    inputs={"in_proj": 1},
    output=("out_proj", "mlp_out_proj"),
    count=lambda block: block.in_split[0],
    tensors={"mlp_bias": (0, 0)},
    sides=("front", "back"),
    activation=_hidden_of_parallel,
    set_count=_set_parallel_neurons,
    narrow_class="NarrowParallelScalingBlock",
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
