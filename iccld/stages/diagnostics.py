"""Diagnostics of a step that need no further pass: classes of the pseudo-labels, and student against teacher.

All of them look at every fourth row and column: a sixteenth of the pixels, at the stride of the logits. `B H W` labels,
`K` classes.
"""

import torch
from torch import Tensor

from iccld.stages.base import sum_and_count
from iccld.strides import LOGITS_STRIDE

CLASSES, DISAGREEMENT = "pseudo_classes", "disagreement"


def thinned(labels: Tensor) -> Tensor:
    """Thin `(B, H, W)` to `(B, H/4, W/4)`: the pixel after the middle of each cell of the logits."""
    return labels[:, LOGITS_STRIDE // 2 :: LOGITS_STRIDE, LOGITS_STRIDE // 2 :: LOGITS_STRIDE]


def class_counts(pseudo_labels: Tensor, source_labels: Tensor, *, num_classes: int) -> Tensor:
    """Count each class's pixels in the pseudo-labels and in the source's labels, `(B, H, W)` each: `(2, K)` int64."""
    classes = torch.arange(num_classes, device=source_labels.device).view(-1, 1, 1, 1)
    counts = [(thinned(labels) == classes).sum(dim=(1, 2, 3)) for labels in (pseudo_labels, source_labels)]
    return torch.stack(counts)


def disagreement(logits: Tensor, labels: Tensor, where: Tensor) -> Tensor:
    """Measure the share of pixels whose arg max is not the label, where `where` is set; returns (sum, count).

    logits: `(B, K, H/4, W/4)`, the student's; labels: `(B, H, W)`, the teacher's; where: `(B, H/4, W/4)` bool.
    """
    differing = (logits.detach().argmax(dim=1) != thinned(labels)) & where
    return sum_and_count(differing.sum(), where.sum())
