"""The plan where whole blocks or branches go: a model and the share that goes in, a row a state and a remark out."""

from __future__ import annotations

from torch import nn

from families import family_of
from pruning.depth import DEPTH, candidates, depth_count, is_attention
from pruning.ranking import scheduled_ratio, spread
from pruning.units import unit_weights


def depth_states(model: nn.Module, target: str, rate: float, states: int, schedule: str) -> list[dict]:
    """Density and cost of each state, as if the last blocks or branches went, of attentions and MLPs the same share."""
    family = family_of(model)
    units, groups = family.units(model), candidates(family.branches_as_units(model), target)
    kinds = [[keys for keys in groups.values() if is_attention(keys[0]) == of] for of in (True, False)]
    weights = {key: group.count * unit_weights(model, group) for key, group in units.items()}
    rows = []
    for state in range(states):
        ratio = scheduled_ratio(schedule, rate, state, states) if state else 0.0
        count = depth_count(len(groups), target, ratio)
        shares = [count, 0] if target == "block" else spread([len(kind) for kind in kinds], count)
        stays = {key for kind, share in zip(kinds, shares, strict=True) for keys in kind[:share] for key in keys}
        cost = family.cost(model, {key: range(group.count if key in stays else 0) for key, group in units.items()})
        density = sum(weights[key] for key in stays) / sum(weights.values())
        rows.append({"state": state, "density": density, DEPTH[target]: count, **cost})
    return rows


def which_go(model: nn.Module, target: str) -> str:
    """What the rows leave open, in a line."""
    branches = family_of(model).branches_as_units(model)
    costs = {key: branch.macs(model, branch) / 1e9 for key, branch in branches.items()}
    macs = [sum(costs[key] for key in keys) for keys in candidates(branches, target).values()]
    remark = f"Which {DEPTH[target]} go is up to the scores; here it is the last ones"
    if target == "branch":
        remark += ", of attentions and MLPs the same share"
    if min(macs) == max(macs):
        return f"{remark}. All cost the same."
    return f"{remark}. One costs {min(macs):.4f} to {max(macs):.4f} G MACs."
