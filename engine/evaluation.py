"""Evaluation: a model and batches in, the shares of images classified right out."""

from __future__ import annotations

import torch
from torch import nn

from dataset import Batches, FolderBatches
from engine.processes import ALONE, Processes
from pruning.scores import evaluating
from utils import autocast

TOP5_CLASSES = 20  # with fewer classes, five guesses say little


@torch.no_grad()
def accuracies(
    model: nn.Module, data: Batches | FolderBatches, precision: torch.dtype | None = None, processes: Processes = ALONE
) -> dict:
    """{"accuracy": share} of images whose largest logit is right; with 20 classes or more also "top5", one of five.

    `precision` is the autocast type, None the model's own. Of several `processes` each looks at its share.
    """
    parameter = next(model.parameters())
    # seen and right; of those with classes enough, seen and right among five
    counts = torch.zeros(2, 2, dtype=torch.long, device=parameter.device)
    with evaluating(model), autocast(parameter.device, precision):
        for images, labels in data.sequential(whole=False):
            logits = model(images.to(parameter.dtype))
            counts[0, 0] += len(labels)
            counts[0, 1] += (logits.argmax(1) == labels).sum()
            if logits.shape[1] >= TOP5_CLASSES:
                counts[1, 0] += len(labels)
                counts[1, 1] += (logits.topk(5).indices == labels[:, None]).any(1).sum()
    found = zip(("accuracy", "top5"), processes.sum_(counts).tolist(), strict=True)
    return {name: right / seen for name, (seen, right) in found if seen}


def accuracy(model: nn.Module, data: Batches | FolderBatches, precision: torch.dtype | None = None) -> float:
    """Fraction of images whose largest logit is right."""
    return accuracies(model, data, precision)["accuracy"]
