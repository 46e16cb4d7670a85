#!/usr/bin/env python
"""Dense, masked, removed, and Torch-Pruning's result at the same counts: forward passes, interleaved medians.

    python benchmarks/inference.py [--arch vit_tiny] [--batch_sizes 1 64] [--repeats 21] [--threads N]

All four start from one timm model of the architecture's geometry. Two thirds of the heads and 70% of the MLP neurons
go, chosen by magnitude. The limit is dense over removed MACs. Needs `pip install torch-pruning` for the last column.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads; see threads.py

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from export import compact
from models.vit import CONFIGS
from utils import format_table
from vit_pruning_utils_head_mlp import rank_units
from vit_structured_pruning import score_units, unit_masks, vit_macs, vit_units

HEAD_RATIO, MLP_RATIO = 2 / 3, 0.7


def timm_model(arch: str) -> nn.Module:
    config = CONFIGS[arch]
    return VisionTransformer(
        img_size=config.img_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=10,
    ).eval()


def torch_pruning_result(dense: nn.Module, keep_heads: int, keep_neurons: int) -> nn.Module:
    """The same counts by Torch-Pruning's dependency graph, as its ViT example does it."""
    import torch_pruning as tp

    model = copy.deepcopy(dense)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    hidden = model.blocks[0].mlp.fc1.out_features
    size = model.patch_embed.img_size[0]
    head_ratio = 1 - (keep_heads + 0.5) / attentions[0].num_heads  # it rounds the number to remove up
    ratios = {block.mlp.fc1: 1 - keep_neurons / hidden for block in model.blocks}
    ratios |= {attention.qkv: head_ratio for attention in attentions}  # heads go only where channels would
    pruner = tp.pruner.BasePruner(
        model,
        torch.randn(1, 3, size, size),
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        ignored_layers=[model.head, model.patch_embed.proj],
        num_heads={attention.qkv: attention.num_heads for attention in attentions},
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=head_ratio,
    )
    pruner.step()
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.attn_dim = attention.qkv.out_features // 3
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", choices=list(CONFIGS), default="vit_tiny")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    dense = timm_model(args.arch)
    units = vit_units(dense)
    scores = score_units(dense, units, "magnitude")
    kept = rank_units(dense, units, scores, {"head": HEAD_RATIO, "neuron": MLP_RATIO})
    masked = copy.deepcopy(dense)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for name, mask in unit_masks(units, kept, parameters).items():
            parameters[name].mul_(mask)
    removed, _ = compact(masked, kept)
    models = {"dense": dense, "masked": masked, "removed": removed}
    heads, neurons = len(kept["blocks.0.attn"]), len(kept["blocks.0.mlp"])
    try:
        models["Torch-Pruning"] = torch_pruning_result(dense, heads, neurons)
    except ImportError:
        print("Torch-Pruning is not installed (pip install torch-pruning): its column is left out")
    limit = vit_macs(dense) / vit_macs(removed)
    for name, model in models.items():
        block = model.blocks[0]
        print(f"{name:<14} {block.attn.num_heads} heads, {block.mlp.fc1.out_features} neurons per block, "
              f"{sum(p.numel() for p in model.parameters()):,} parameters")  # fmt: skip

    rows = []
    size = dense.patch_embed.img_size[0]
    for batch_size in args.batch_sizes:
        images = torch.randn(batch_size, 3, size, size)
        times: dict[str, list[float]] = {name: [] for name in models}
        with torch.inference_mode():
            for model in models.values():
                model(images)
            for _ in range(args.repeats):
                for name, model in models.items():
                    started = time.perf_counter()
                    model(images)
                    times[name].append(time.perf_counter() - started)
        for name, spent in times.items():
            # pair by pair, so that a drift of the machine's speed cancels
            gain = statistics.median(a / b for a, b in zip(times["dense"], spent, strict=True))
            low, middle, high = statistics.quantiles(spent, n=4)
            rows.append(
                {
                    "batch": batch_size,
                    "model": name,
                    "median ms": f"{1000 * middle:.2f}",
                    "quartiles ms": f"{1000 * low:.2f}-{1000 * high:.2f}",
                    "over dense": f"{gain:.2f}x",
                    "of the limit": f"{100 * gain / limit:.0f}%" if name not in ("dense", "masked") else "",
                }
            )
    print(f"\n{args.arch}, float32, {common.machine()}, {args.repeats} repeats; MACs limit {limit:.2f}x\n")
    print(format_table(rows, {title: title for title in rows[0]}))
    common.save("inference", {"arch": args.arch, "limit": limit, "machine": common.machine(), "rows": rows})


if __name__ == "__main__":
    main()
