#!/usr/bin/env python
"""Which `--round_to` suits this processor: forward passes of the small network at several multiples, interleaved.

    python benchmarks/round_to.py [--archs res20s vit_tiny] [--batch_sizes 1 64] [--multiples 1 4 8 16 32] [--clock cpu]

Layer by layer, 70% of the MLP neurons with two thirds of the heads, or 45% of the filters go, which leaves uneven
numbers where nothing is rounded. Rounding moves the MACs a little, so that what counts is the last column: time per MAC
over that of `--round_to 1`; below 1 the multiple is worth its MACs. ResNets are measured as they are removed and folded
(`export.py --fold`). Multiples above the smallest layer are left out.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads; see threads.py

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from families import family_of
from models import build_model
from pruning.ranking import rank_units
from pruning.removal import remove_units
from pruning.rounding import ROUNDED
from utils import format_table

RATIOS = {"head": 2 / 3, "neuron": 0.7, "filter": 0.45}


def small_models(arch: str, multiples: list[int]) -> dict[tuple[int, str], tuple[nn.Module, int, str]]:
    """(multiple, form) -> the network, its MACs, and how many units its first and last layers keep."""
    dense = build_model(arch, 10).eval()
    family = family_of(dense)
    units = family.units(dense, first=False)
    generator = torch.Generator().manual_seed(0)
    scores = {key: torch.rand(group.count, generator=generator).double() for key, group in units.items()}
    ratios = {kind: ratio for kind, ratio in RATIOS.items() if kind in family.kinds}
    smallest = min(group.count for group in units.values() if group.kind in ROUNDED)
    found = {}
    for multiple in (multiple for multiple in multiples if multiple <= smallest):
        kept = rank_units(dense, units, scores, ratios, round_to=multiple)
        small = remove_units(copy.deepcopy(dense), units, kept).eval()
        macs = family.cost(dense, kept)["macs"]
        counts = sorted({len(kept[key]) for key, group in units.items() if group.kind in ROUNDED})
        found[multiple, "removed"] = small, macs, ", ".join(map(str, counts))
        folded = copy.deepcopy(small)
        if family.fold_(folded):
            found[multiple, "folded"] = folded, macs, ", ".join(map(str, counts))
    return found


def rows_of(arch: str, batch: int, args: argparse.Namespace) -> list[dict]:
    models = small_models(arch, args.multiples)
    size = family_of(models[1, "removed"][0]).image_size(models[1, "removed"][0])
    images, clock = torch.randn(batch, 3, size, size), common.CLOCKS[args.clock]
    works = {
        name: lambda model=model: common.seconds(lambda: model(images), clock=clock)
        for name, (model, *_) in models.items()
    }
    with torch.inference_mode():
        for work in works.values():
            work()
        times = common.interleaved(works, args.repeats)
    rows = []
    for (multiple, form), (_, macs, counts) in models.items():
        low, middle, high = common.quartiles(times[multiple, form])
        over = common.pairwise(times[multiple, form], times[1, form])
        rows.append(
            {
                "model": arch,
                "form": form,
                "batch": batch,
                "round_to": multiple,
                "a layer keeps": counts,
                "MACs": f"{macs / 1e6:.2f} M",
                "median ms": f"{1000 * middle:.2f}",
                "quartiles ms": f"{1000 * low:.2f}-{1000 * high:.2f}",
                "time over 1": f"{over:.2f}",
                "per MAC over 1": f"{over * models[1, form][1] / macs:.2f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--archs", nargs="+", default=["res20s", "res18", "vit_tiny", "vit_small"])
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="with 1 among them")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    common.add_clock(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [row for arch in args.archs for batch in args.batch_sizes for row in rows_of(arch, batch, args)]
    print(f"\nfloat32, {common.machine()}, {args.clock} time, {args.repeats} repeats\n")
    print(format_table(rows, {title: title for title in rows[0]}))
    common.save("round_to", {"machine": common.machine(), "clock": args.clock, "rows": rows})


if __name__ == "__main__":
    main()
