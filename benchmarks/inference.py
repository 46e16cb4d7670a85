#!/usr/bin/env python
"""Dense, masked, removed, folded, compiled, in ONNX Runtime, and Torch-Pruning's result: interleaved forward passes.

    python benchmarks/inference.py [--arch vit_tiny] [--batch_sizes 1 8 64] [--repeats 21] [--threads N]
    python benchmarks/inference.py --arch res20s --filter_ratio 0.5 --clock cpu --threads 1
    python benchmarks/inference.py --arch timm/vit_small_patch16_dinov3 --img_size 224 --head_ratio 0.5 --mlp_ratio 0.5

All start from one model of the architecture's geometry, for ViTs on timm's modules. Two thirds of the heads, 70% of the
MLP neurons and half of the filters are removed by default, chosen by magnitude. The limit is dense over removed MACs;
"over dense" compares with the dense network as PyTorch runs it, "same engine" with the dense network in the same form.
"compiled" is AOTInductor's package, which needs a C++ compiler and a minute or more; ONNX rows need onnx, onnxscript
and onnxruntime; Torch-Pruning's need `pip install torch-pruning` and a ViT that its graph can follow: a ResNet's
filters it ties along the residual stream, so that there are no same counts.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from deployment.compiled import aot_package
from deployment.onnx_file import open_session, to_onnx
from deployment.quantise import to_int8
from export import compact
from families import family_of
from models import BUILDERS, build_model
from models.vit import CONFIGS
from pruning.ranking import rank_units
from pruning.scores import score_units
from pruning.units import Units, unit_masks
from utils import format_table


def dense_model(arch: str, img_size: int | None) -> nn.Module:
    """On timm's own modules; ours are the same functions, which Torch-Pruning does not know."""
    if arch not in CONFIGS:
        return build_model(arch, 10, img_size).eval()
    config = CONFIGS[arch]
    return VisionTransformer(
        img_size=img_size or config.img_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=10,
    ).eval()


def torch_pruning_result(dense: nn.Module, units: dict[str, Units], kept: dict[str, list[int]], size: int) -> nn.Module:
    """The same counts by Torch-Pruning's dependency graph, as its ViT example does it."""
    import torch_pruning as tp

    model = copy.deepcopy(dense)
    ratios, attentions = {}, {}
    for key, group in units.items():
        module, left = model.get_submodule(key), len(kept[key])
        if group.kind == "neuron":
            ratios[module.fc1] = 1 - left / group.count
        else:
            attentions[module.qkv] = module
            ratios[module.qkv] = 1 - (left + 0.5) / group.count  # it rounds the number to remove up
    head_ratio = max(ratios[qkv] for qkv in attentions)
    pruner = tp.pruner.BasePruner(
        model,
        torch.randn(1, 3, size, size),
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        ignored_layers=[model.head, model.patch_embed.proj],
        num_heads={qkv: module.num_heads for qkv, module in attentions.items()},
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=head_ratio,
    )
    pruner.step()
    for qkv, module in attentions.items():
        module.num_heads = pruner.num_heads[qkv]
        module.attn_dim = qkv.out_features // 3
    model.eval()
    model(torch.randn(1, 3, size, size))  # fails here where Torch-Pruning left shapes that do not fit
    return model


def candidates(arch: str, img_size: int | None, ratios: dict[str, float]) -> tuple[dict[str, nn.Module], int, float]:
    """PyTorch's models by name, the pixels of their images, and dense over removed MACs."""
    dense = dense_model(arch, img_size)
    family = family_of(dense)
    units, size = family.units(dense, first=False), family.image_size(dense)
    ratios = {kind: ratio for kind, ratio in ratios.items() if kind in family.kinds}
    kept = rank_units(dense, units, score_units(dense, units, "magnitude"), ratios)
    masked = copy.deepcopy(dense)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for name, mask in unit_masks(units, kept, parameters).items():
            parameters[name].mul_(mask)
    removed, _ = compact(masked, kept)
    models = {"dense": dense, "masked": masked, "removed": removed.eval()}
    folded = copy.deepcopy(removed)
    if family.fold_(folded):
        models["removed, folded"] = folded
        models["dense, folded"] = copy.deepcopy(dense)
        family.fold_(models["dense, folded"])
    if family.counts_by == "ratio":
        try:
            models["Torch-Pruning"] = torch_pruning_result(dense, units, kept, size)
        except ImportError:
            print("Torch-Pruning is not installed (pip install torch-pruning): its rows are left out")
        except Exception as error:  # whatever its graph does not know
            print(f"Torch-Pruning cannot prune this model ({type(error).__name__}: {str(error).splitlines()[0][:150]})")
    before, after = family.cost(dense, {}), family.cost(dense, kept)
    print(f"{arch}, {size} pixels: " + ", ".join(f"{name} {before[name]:,} -> {after[name]:,}" for name in before))
    for name, model in models.items():
        print(f"{name:<16} {sum(p.numel() for p in model.parameters()):,} parameters")
    return models, size, before["macs"] / after["macs"]


def other_engines(
    models: dict[str, nn.Module], size: int, threads: int, folder: Path, without: list[str]
) -> dict[str, Callable[[Tensor], object]]:
    """The dense and the removed network, folded where that does anything, compiled and in ONNX Runtime."""
    found: dict[str, Callable[[Tensor], object]] = {}
    for name in ("dense", "removed"):
        model = models.get(f"{name}, folded", models[name])
        if "compiled" not in without:
            package = folder / f"{name}.pt2"  # one for all batch sizes; torch.compile makes one for batch 1 and another
            aot_package(model, package)
            found[f"{name}, compiled"] = torch._inductor.aoti_load_package(str(package))
        if "onnx" not in without:
            file = folder / f"{name}.onnx"
            to_onnx(model, file)
            found[f"{name}, ONNX"] = in_runtime(file, threads)
    if "onnx" not in without and "int8" not in without:
        noise = torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(0))
        for form in ("static", "dynamic"):  # how right it is, is another question; see export.py --int8
            to_int8(folder / "removed.onnx", folder / f"{form}.onnx", form, [noise])
            found[f"removed, ONNX int8 {form}"] = in_runtime(folder / f"{form}.onnx", threads)
    return found


def in_runtime(file: Path, threads: int) -> Callable[[Tensor], object]:
    session = open_session(file, threads)
    return lambda images: session(images.numpy())


def measure(runs: dict[str, Callable[[Tensor], object]], batch: int, size: int, args: argparse.Namespace) -> dict:
    """Seconds of each forward pass, round by round."""
    images = torch.randn(batch, 3, size, size)
    clock = common.CLOCKS[args.clock]
    works = {name: lambda run=run: common.seconds(lambda: run(images), clock=clock) for name, run in runs.items()}
    with torch.inference_mode():
        for work in works.values():
            work()
            work()
        return common.interleaved(works, args.repeats)


def table(times: dict[str, list[float]], batch: int, limit: float) -> list[dict]:
    rows = []
    for name, spent in times.items():
        # pair by pair, so that a drift of the machine's speed cancels
        gains = [a / b for a, b in zip(times["dense"], spent, strict=True)]
        low, middle, high = common.quartiles(spent)
        worst, gain, best = common.quartiles(gains)
        alike = name.replace("removed", "dense").partition(" int8")[0] if name.startswith("removed") else ""
        rows.append(
            {
                "batch": batch,
                "model": name,
                "median ms": f"{1000 * middle:.2f}",
                "quartiles ms": f"{1000 * low:.2f}-{1000 * high:.2f}",
                "over dense": f"{gain:.2f}x",
                "quartiles": f"{worst:.2f}-{best:.2f}",
                "of the limit": f"{100 * gain / limit:.0f}%" if name.startswith(("removed", "Torch")) else "",
                "same engine": f"{common.pairwise(times[alike], spent):.2f}x" if alike in times else "",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="vit_tiny", help=f"one of {', '.join(BUILDERS)}, or timm/NAME")
    parser.add_argument("--img_size", type=int, help="pixels; the architecture's own when not given")
    parser.add_argument("--head_ratio", type=float, default=2 / 3, help="share of the heads to prune")
    parser.add_argument("--mlp_ratio", type=float, default=0.7, help="share of the MLP neurons to prune")
    parser.add_argument("--filter_ratio", type=float, default=0.5, help="share of the filters to prune")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--without", nargs="+", default=[], choices=["compiled", "onnx", "int8"], help="rows that are left out"
    )
    common.add_clock(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ratios = {"head": args.head_ratio, "neuron": args.mlp_ratio, "filter": args.filter_ratio}
    models, size, limit = candidates(args.arch, args.img_size, ratios)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runs = {**models, **other_engines(models, size, args.threads, Path(folder), args.without)}
        for batch in args.batch_sizes:
            rows += table(measure(runs, batch, size, args), batch, limit)
    facts = f"{args.arch}, float32, {common.machine()}, {args.clock} time, {args.repeats} repeats"
    print(f"\n{facts}; MACs limit {limit:.2f}x\n")
    print(format_table(rows, {title: title for title in rows[0]}))
    content = {"arch": args.arch, "limit": limit, "machine": common.machine(), "clock": args.clock, "rows": rows}
    common.save("inference", content)


if __name__ == "__main__":
    main()
