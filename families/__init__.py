"""Stub until the merge."""
from types import SimpleNamespace
import torch
import pruning_utils as p
from vit_structured_pruning import LayoutError, layout_problem, vit_units


Family = SimpleNamespace


def family_of(model):
    cnn = p.is_cnn(model)
    if not cnn and layout_problem(model):
        raise LayoutError(layout_problem(model))
    def fmt(removed, precision):
        return torch.channels_last if cnn and (not removed or precision is None) else None
    def units(model, kinds=None, first=True):
        return p.filter_units(model, first) if cnn else vit_units(model, kinds or ("head", "neuron"))
    return SimpleNamespace(title=p.family(model), counts_by="density" if cnn else "ratio", classifier="fc." if cnn else "head",
        kinds=("filter",) if cnn else ("head", "neuron"), prunable_layers=p.prunable_layers, units=units, cost=p.cost_of,
        working_units_=p.working_units_, image_size=p.image_size, memory_format=fmt)
