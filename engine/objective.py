"""The objective: logits and targets in, the loss of a step and the number of images classified right out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The mean over a batch; logits [B, classes], targets labels [B] or shares [B, classes], smoothed already."""
    return F.cross_entropy(logits, targets, label_smoothing=smoothing if targets.ndim == 1 else 0.0)


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), the mean over a batch; both [B, classes]."""
    own, taught = (F.log_softmax(values / temperature, 1) for values in (logits, teacher))
    return temperature**2 * F.kl_div(own, taught, reduction="batchmean", log_target=True)


def count_right(logits: Tensor, targets: Tensor) -> Tensor:
    """How many images have their largest logit at their label; of a mixed image, at the label of its larger share."""
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return (logits.argmax(1) == labels).sum()
