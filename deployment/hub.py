"""Writes an exported model as a folder that the Hugging Face hub expects.

    write_hub(Path("results/NAME/model"), Path("out"), "digits", 16)

Nothing is uploaded. `export.load` and the lines of the card load the folder as they load `model/`; the hub reads the
metadata at the top of README.md.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file

from dataset import Preprocessing
from deployment.card import is_pruned
from deployment.exported import as_json, read_config, seal, whole_folder
from deployment.quantise import INT8_FILES
from families import family_of_config
from families.cards import LOADER
from utils import RunError

# the data sets' names on the hub; scikit-learn's digits and folders of one's own have none
HUB_NAMES = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "fashionmnist": "zalando-datasets/fashion_mnist",
    "imagenet": "ILSVRC/imagenet-1k",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}


def check_hub() -> None:
    """Raise a RunError that says what to install when the package that writes the metadata is missing."""
    try:
        importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise RunError(f"--hf: needs huggingface_hub ({error}); pip install huggingface_hub") from error


def write_hub(model: Path, folder: Path, dataset: str | None, size: int) -> None:
    """Write the folder, whole or not at all.

    Args:
        model: an exported `model/`.
        folder: where to write it; it must not exist yet.
        dataset: key of DATASETS, None where the weights came without one.
        size: pixels a side of its images.

    Raises:
        RunError: the model is damaged, or the disk is full.
    """
    config = hub_config(read_config(model), size)
    config, blob = seal(config, load_file(str(model / "model.safetensors")))
    with whole_folder("--hf", folder) as draft:
        (draft / "model.safetensors").write_bytes(blob)
        (draft / "config.json").write_text(as_json(config), "utf-8")
        card = (model / "README.md").read_text("utf-8").replace('export.load("model")', 'export.load(".")')
        (draft / "README.md").write_text(f"---\n{metadata(config, dataset)}\n---\n\n{card}", "utf-8")
        for name in ("parity.json", LOADER, "model.onnx", *INT8_FILES.values()):
            if (model / name).exists():
                shutil.copyfile(model / name, draft / name)


def hub_config(config: Mapping, size: int) -> dict:
    """config.json with the keys under which timm's models on the hub say what their images and classes are.

    `architecture` is the dense one's name. The widths that are left are in our own keys: `timm.create_model` alone
    cannot build them, the lines of the card do.
    """
    known = {"input_size": [3, size, size]}
    if shown := Preprocessing.from_config(config):
        mean, std, kind = list(shown.mean), list(shown.std), shown.interpolation
        known |= {"mean": mean, "std": std, "interpolation": kind, "crop_pct": shown.crop / shown.resize}
        known |= {"crop_mode": "squash"} if shown.resize_mode == "square" else {}
    added = {"architecture": config["provenance"].get("arch", ""), "pretrained_cfg": known}
    if classes := config.get("class_names"):
        added |= {"num_classes": len(classes), "label_names": list(classes)}
    return {**{key: value for key, value in config.items() if key != "sha256"}, **added}


def metadata(config: Mapping, dataset: str | None) -> str:
    """The head of README.md: YAML that the hub shows and searches.

    The licence is the one of this program; who trains on data with another one changes it.
    """
    cards = importlib.import_module("huggingface_hub")
    family, arch = family_of_config(config), config["architecture"]
    timm = "with timm" in family.card(config)[1]
    accuracy = config["metrics"].get("test_accuracy")
    pruned = is_pruned(config)
    results, name = [], arch.rpartition("/")[2] + ("-pruned" if pruned else "")
    tags = ["image-classification"]
    tags += ["pruning", "structured-pruning"] if pruned else []
    tags += ["safetensors", "timm"] if timm else ["safetensors"]
    if accuracy is not None and dataset is not None:
        results = [
            cards.EvalResult(
                task_type="image-classification",
                dataset_type=HUB_NAMES.get(dataset, dataset),
                dataset_name=dataset,
                dataset_split="test",
                metric_type="accuracy",
                metric_value=round(accuracy, 6),
            )
        ]
    fields = {
        "license": "mit",
        "library_name": "timm" if timm else "pytorch",
        "pipeline_tag": "image-classification",
        "tags": tags,
        "datasets": [HUB_NAMES[dataset]] if dataset in HUB_NAMES else None,
        "metrics": ["accuracy"],
        "model_name": name,
        "eval_results": results or None,
    }
    return cards.ModelCardData(**{key: value for key, value in fields.items() if value}).to_yaml()
