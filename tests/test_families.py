"""What every family of models answers, and which one a model belongs to."""

import pytest
import timm
import torch
from torch import nn

import families
import vit_pruning_utils
import vit_structured_pruning
from families import family_of, family_of_config
from models import build_model
from models.resnet import ResNet
from models.vit import VisionTransformer
from pruning.removal import remove_units
from pruning.scores import CRITERIA
from pruning.units import LayoutError, count_parameters

SIZE = 8


def vit():
    return VisionTransformer(img_size=SIZE, patch_size=4, num_classes=5, embed_dim=12, depth=2, num_heads=3)


def timm_vit():
    return build_model("timm/test_vit", 5, img_size=32)


def resnet():
    return ResNet((1, 1), (4, 6), projected=False, num_classes=5, img_size=SIZE)


MODELS = {"ours": (vit, "ViT"), "timm's": (timm_vit, "ViT"), "resnet": (resnet, "CNN")}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    return request.param[0]()


@pytest.mark.parametrize(("build", "title"), MODELS.values(), ids=MODELS)
def test_a_model_has_the_family_of_its_layers(build, title):
    assert family_of(build()).title == title


@pytest.mark.parametrize("build", [lambda: nn.Linear(2, 2), lambda: timm.create_model("test_resnet")])
def test_a_model_of_no_family_is_refused_with_the_reason(build):
    with pytest.raises(LayoutError, match="no transformer blocks"):
        family_of(build())


def test_kinds_choose_among_the_units(model):
    family = family_of(model)
    units = family.units(model)
    assert {group.kind for group in units.values()} == set(family.kinds)
    for kind in family.kinds:
        assert family.units(model, kinds=(kind,)).keys() == {key for key in units if units[key].kind == kind}


def test_the_first_layer_counts_only_when_asked(model):
    family = family_of(model)
    few, all_of_them = family.prunable_layers(model), family.prunable_layers(model, first=True)
    (first,) = all_of_them.keys() - few.keys()
    assert all_of_them[first] is next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    # only in ResNets are its filters units
    units, without = family.units(model), family.units(model, first=False)
    assert units.keys() - without.keys() == ({first} if first in units else set())


def test_the_classifier_is_what_makes_classes(model):
    names = {name for name, _ in model.named_parameters() if name.startswith(family_of(model).classifier)}
    assert {len(model.get_parameter(name)) for name in names} == {5}
    assert len(names) == 2


def test_models_see_images_of_their_size(model):
    size = family_of(model).image_size(model)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 5)
    assert size == (32 if hasattr(model, "arch_name") else SIZE)


def test_a_described_model_can_be_built_again(model):
    family = family_of(model)
    units = family.units(model)
    kept = {key: list(range(1, group.count)) for key, group in units.items() if group.removable}
    expected = family.cost(model, kept)
    remove_units(model, units, kept)
    config = family.describe(model, {key: kept.get(key, list(range(units[key].count))) for key in units})
    assert family_of_config(config) is family
    dense, again = family.rebuild(config)
    remove_units(dense, family.units(dense), again)
    dense.load_state_dict(model.state_dict())
    # where the units of a block go, ResNets know by id
    size = family.image_size(model)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dense.eval()(images), model.eval()(images), rtol=0, atol=0)
    assert count_parameters(model) == expected["parameters"]
    assert family.cost(model, {})["macs"] == expected["macs"]


def test_a_config_of_no_family_is_refused():
    with pytest.raises(LayoutError, match="resnet"):
        family_of_config({"mean": None})


def test_convolutions_train_channels_last_but_for_removed_ones_in_half_precision():
    family = family_of(resnet())
    assert family.memory_format(False, None) is family.memory_format(False, torch.bfloat16) is torch.channels_last
    assert family.memory_format(True, None) is torch.channels_last
    assert family.memory_format(True, torch.bfloat16) is None
    assert {family_of(vit()).memory_format(removed, None) for removed in (False, True)} == {None}


def test_a_third_family_is_one_line_in_the_table(monkeypatch):
    class Linears:
        title = "linear"

        def problem(self, model):
            return None if isinstance(model, nn.Linear) else "not linear"

    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, Linears()))
    assert family_of(nn.Linear(2, 2)).title == "linear"
    assert family_of(vit()).title == "ViT"


def test_every_door_has_the_one_table_of_criteria_and_all_that_it_promises():
    assert vit_structured_pruning.CRITERIA is CRITERIA
    for door in (vit_structured_pruning, vit_pruning_utils):
        assert all(hasattr(door, name) for name in door.__all__)
