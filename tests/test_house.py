"""The house: imports go one way, rooms stay small, nothing outside the families asks which one a model has."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# a room may import from the floors below its own, and from its own package
FLOORS = [
    {"utils"},
    {"models", "images", "pruning", "rsst"},
    {"families", "dataset"},
    {"settings"},
    {"vit_pruning_utils", "vit_pruning_utils_head_mlp", "vit_structured_pruning", "pruning_utils", "reporting"},
    {"engine", "report"},
    {"deployment"},
    {"cli", "export"},
    {"search"},
    {"main_imp_fillback"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).with_suffix("").parts[0] in FLOOR]
DOORS = FLOORS[4] - {"reporting"}  # they may use one another


def room_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_is_small_and_imports_go_one_way(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    room = room_of(path)
    for name in imports_of(tree):
        other = name.partition(".")[0]
        if other in FLOOR and other != room and not {room, other} <= DOORS:
            assert FLOOR[other] < FLOOR[room], f"{room} imports {name}"
    assert ast.get_docstring(tree), "says what comes in and what goes out"
    assert text.count("\n") <= 600
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and room_of(path) != "cli":
            assert node.end_lineno - node.lineno < 62, f"{node.name} has more than about 60 lines"


def test_the_entry_is_an_essay():
    assert (ROOT / "main_imp_fillback.py").read_text().count("\n") <= 350


def test_nothing_outside_the_families_asks_for_the_family():
    asking = re.compile(r"isinstance\([^)]*(ResNet|VisionTransformer)|is_cnn|\.title ==|FAMILIES\[")
    for path in FILES:
        if room_of(path) not in ("families", "models"):
            assert not asking.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readme_names_the_steps_of_the_loop_in_its_order(readme):
    rows = re.findall(r"^\| \d+ \| (`.*?) \|", (ROOT / readme).read_text(encoding="utf-8"), flags=re.M)
    first, *named = [step for row in rows for step in re.findall(r"`(\w+)`", row)]
    loop = (ROOT / "main_imp_fillback.py").read_text(encoding="utf-8").split("def prune_and_retrain")[1]
    calls = list(dict.fromkeys(call for call in re.findall(r"(\w+)\(", loop) if call in named))
    assert len(named) == 8
    assert named == calls
    assert first == "step"


DOCUMENTED = {
    "models.vit": "VisionTransformer vit_tiny vit_small vit_base vit_small_imagenet vit_base_imagenet "
    "vit_large_imagenet load_pretrained_weights",
    "vit_pruning_utils": "is_vit_model pruning_model_vit check_sparsity_vit extract_mask_vit prune_model_custom_vit "
    "remove_prune_vit prune_model_custom_fillback_vit prune_model_custom_fillback_vit_by_head",
    "vit_pruning_utils_head_mlp": "prune_model_custom_fillback_vit_head_and_mlp",
    "vit_structured_pruning": "compute_vit_head_importance compute_mlp_neuron_importance structured_prune_vit_heads "
    "structured_prune_mlp_neurons CRITERIA prune_attention_heads_hard prune_mlp_neurons_hard check_vit_structure "
    "count_vit_parameters",
    "pruning_utils": "pruning_model check_sparsity extract_mask prune_model_custom remove_prune "
    "prune_model_custom_fillback",
    "export": "load main",
    "report": "write main",
}


@pytest.mark.parametrize("module", DOCUMENTED)
def test_documented_names_stay(module):
    found = importlib.import_module(module)
    assert [name for name in DOCUMENTED[module].split() if not hasattr(found, name)] == []
