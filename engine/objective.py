"""The objective: a network's outputs, targets and a teacher's outputs in; the loss of a step and the number of images
classified right out.

A loss has three shares, all of them means over a batch (CE: cross entropy, z: logits, F: features):

    (1 - alpha) CE(z, targets) + alpha distance(z, teacher's z) + W feature_distance(F, teacher's F)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Answer(NamedTuple):
    """What a network says of B images.

    Attributes:
        heads: logits [B, classes] of each classifier; in training, distilled DeiTs have two: class, distillation.
        features: the output tokens [B, N, D] of the last block, where they are needed.
    """

    heads: tuple[Tensor, ...]
    features: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """[B, classes]: the mean over the heads, which evaluation uses."""
        return self.heads[0] if len(self.heads) == 1 else sum(self.heads) / len(self.heads)


@dataclass(frozen=True)
class Objective:
    """The loss of a part of a batch.

    A network with two heads (Touvron et al., DeiT, ICML 2021, arXiv:2012.12877, section 4) has the labels' share of the
    loss at its class head and the teacher's at its distillation head; where no teacher shows logits that count, both
    learn from the labels, half each.

    Attributes:
        smoothing: of labels; not of a teacher's.
        alpha: the share of the loss that a teacher's logits have.
        temperature: of `distillation`, the soft form (DeiT's eq. 2); unused in the hard one.
        hard: the teacher's largest logit counts as a label instead (DeiT's eq. 3, where alpha is 0.5).
        features: the weight of `feature_distance`.
    """

    smoothing: float = 0.0
    alpha: float = 0.0
    temperature: float | None = None
    hard: bool = False
    features: float = 0.0

    def __call__(
        self, answer: Answer, targets: Tensor, logits: Tensor | None = None, features: Tensor | None = None
    ) -> Tensor:
        """The loss; targets as in `cross_entropy`, logits [B, classes] and features [B, N, D] are a teacher's."""
        if logits is None or not self.alpha:
            losses = [cross_entropy(head, targets, self.smoothing) for head in answer.heads]
            loss = losses[0] if len(losses) == 1 else sum(losses) / len(losses)
        else:
            own = cross_entropy(answer.heads[0], targets, self.smoothing)
            loss = (1 - self.alpha) * own + self.alpha * self._from_teacher(answer.heads[-1], logits)
        if features is None:
            return loss
        return loss + self.features * feature_distance(answer.features, features)

    def _from_teacher(self, logits: Tensor, teacher: Tensor) -> Tensor:
        if self.hard:
            return F.cross_entropy(logits, teacher.argmax(1))
        return distillation(logits, teacher, self.temperature)


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The mean over a batch; logits [B, classes], targets labels [B] or shares [B, classes], smoothed already."""
    return F.cross_entropy(logits, targets, label_smoothing=smoothing if targets.ndim == 1 else 0.0)


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), the mean over a batch; both [B, classes]."""
    own, taught = (F.log_softmax(values / temperature, 1) for values in (logits, teacher))
    return temperature**2 * F.kl_div(own, taught, reduction="batchmean", log_target=True)


def feature_distance(features: Tensor, teacher: Tensor) -> Tensor:
    """mean over images, tokens and channels of (norm(features) - norm(teacher))^2; both [B, N, D].

    The hidden-state loss of TinyBERT (Jiao et al. 2020, arXiv:1909.10351, eq. 8) for the last block, without its linear
    map, between tokens that norm() gives mean 0 and variance 1 over their channels, without learned factors, as Wei et
    al. do to a teacher's (2022, arXiv:2205.14141, section 2.1). A token of each has the distance 2 (1 - r), with r the
    correlation of their channels: it lies in [0, 4], whatever the scale of either network.
    """
    own, taught = (F.layer_norm(tokens, tokens.shape[-1:]) for tokens in (features.to(teacher.dtype), teacher))
    return F.mse_loss(own, taught)


def count_right(logits: Tensor, targets: Tensor) -> Tensor:
    """How many images have their largest logit at their label; of a mixed image, at the label of its larger share."""
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return (logits.argmax(1) == labels).sum()
