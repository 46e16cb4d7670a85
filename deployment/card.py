"""Writes the model card, README.md of an exported model, from its config.json and parity.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dataset import Preprocessing
from families import family_of_config


def is_pruned(config: Mapping) -> bool:
    """Whether the model of a config.json has lost anything."""
    return config["provenance"].get("struct") != "dense"


def model_card(config: Mapping, check: Mapping) -> str:
    """README.md of an exported model."""
    provenance, metrics, pruned = config["provenance"], config["metrics"], is_pruned(config)
    parameters, macs = config["parameters"], config["macs"]
    which = "folded" if "folded" in config else "removed" if pruned else "exported"
    columns = ("dense", "removed") if pruned else ("dense",)
    rows = [("", *columns), ("---", *("---:" for _ in columns))]
    rows.append(("parameters", *(f"{parameters[name]:,}" for name in columns)))
    rows.append(("MACs an image", *(f"{macs[name] / 1e9:.4f} G" for name in columns)))
    rows.append(("weights file", *(f"{4 * parameters[name] / 1e6:.2f} MB" for name in columns)))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    facts = "\n".join(f"- {name}: {value}" for name, value in {**provenance, **metrics}.items())
    images = "How its images are normalised is not known: the weights came without their data set."
    if shown := Preprocessing.from_config(config):
        images = f"Images are prepared as in training: {shown.words()} (`preprocessing` in config.json)."
    if names := config.get("class_names"):
        images += f"\n\nClasses, in the order of the logits: {_listed(names)}."
    left, loading = family_of_config(config).card(config)
    if "nm" in provenance:
        left += f"\n\n{_pattern_words(*provenance['nm'].split(':'))}"
    return (
        f"# {'Pruned ' if pruned else ''}{provenance.get('arch', 'Vision Transformer')}\n\n{table}\n\n{left}\n\n"
        f"The {which} model computes what the {'masked' if pruned else 'trained'} one does: largest difference "
        f"{check['max_difference_float32']:.2g} in float32 and {check['max_difference_float64']:.2g} in float64, top-1 "
        f"agreement {100 * check['top1_agreement']:.2f}% of {check['images']:,} validation images (parity.json).\n\n"
        f"{facts}\n\n{images}\n\n{loading}"
    )


def _listed(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most:,} more (`class_names` in config.json)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _pattern_words(keep: str, group: str) -> str:
    return (
        f"Of every {group} consecutive weights of a row of the pruned layers at most {keep} are not zero. The others "
        "are stored as zeros, and zeros as such make no product faster, least of all on a CPU. NVIDIA GPUs of compute "
        "capability 8.0 and more multiply 2:4, and what fits into it, in float16 and bfloat16 by kernels of their own; "
        "there `export.semi_structured_(model)` has them used, and says for how many layers."
    )
