"""Pseudo-labels and their weights (method of DACS and DAFormer). `B C H W` images, `K` classes."""

from typing import NamedTuple

import torch
from torch import Tensor


class PseudoLabels(NamedTuple):
    """labels: `(B, H, W)` uint8 class indices; weights: `(B, H, W)` float32 in [0, 1]; confident: `(B,)` in [0, 1]."""

    labels: Tensor
    weights: Tensor
    confident: Tensor


def pseudo_labels(logits: Tensor, *, threshold: float, valid: Tensor) -> PseudoLabels:
    """The teacher's arg max; every pixel weighs q, the fraction of its image's pixels with confidence >= `threshold`.

    logits: `(B, K, H, W)`; valid: `(B, H, W)` or `(B, H, 1)` bool, False where a pseudo-label is not to be trusted
    (weight 0). q is of the image, not of the batch: so it does not change with the number of ranks.
    """
    confidence, labels = torch.softmax(logits.float(), dim=1).max(dim=1)
    confident = (confidence >= threshold).float().mean(dim=(1, 2))
    weights = (confident[:, None, None] * valid.float()).expand(labels.shape)
    return PseudoLabels(labels.to(torch.uint8), weights, confident)
