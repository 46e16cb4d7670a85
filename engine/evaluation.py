"""Evaluation: a model and batches in, the shares of images classified right out."""

from __future__ import annotations

import torch
from torch import nn

from dataset import Batches, FolderBatches
from pruning.scores import evaluating
from utils import autocast

TOP5_CLASSES = 20  # with fewer classes, five guesses say little


@torch.no_grad()
def accuracies(model: nn.Module, data: Batches | FolderBatches, precision: torch.dtype | None = None) -> dict:
    """{"accuracy": share} of images whose largest logit is right; with 20 classes or more also "top5", one of five.

    `precision` is the autocast type, None the model's own.
    """
    parameter = next(model.parameters())
    correct = {"accuracy": torch.zeros((), dtype=torch.long, device=parameter.device)}
    with evaluating(model), autocast(parameter.device, precision):
        for images, labels in data.sequential():
            logits = model(images.to(parameter.dtype))
            correct["accuracy"] += (logits.argmax(1) == labels).sum()
            if logits.shape[1] >= TOP5_CLASSES:
                right = (logits.topk(5).indices == labels[:, None]).any(1).sum()
                correct["top5"] = correct.get("top5", 0) + right
    return {name: int(count) / len(data) for name, count in correct.items()}


def accuracy(model: nn.Module, data: Batches | FolderBatches, precision: torch.dtype | None = None) -> float:
    """Fraction of images whose largest logit is right."""
    return accuracies(model, data, precision)["accuracy"]
