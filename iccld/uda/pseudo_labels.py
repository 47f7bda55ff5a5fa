"""Pseudo-labels and their weights (method of DACS and DAFormer; options by class). `B C H W` images, `K` classes.

Every statistic is of one image: so it does not change with the number of ranks or the split of a batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from iccld.labels import IGNORE_INDEX

MAX_BALANCE = 4.0
"""The balance of classes raises or lowers a pixel's weight at most so many times, before the mean is restored."""


class PseudoLabels(NamedTuple):
    """Labels `(B, H, W)` uint8 class indices; weights `(B, H, W)` float32 >= 0; confident `(B,)` in [0, 1]."""

    labels: Tensor
    weights: Tensor
    confident: Tensor


def kept_labels(pseudo: PseudoLabels, valid: Tensor, *, class_thresholds: float) -> Tensor:
    """The labels with 255 in the pixels that are left out, `(B, H, W)` uint8.

    An image's weight q leaves out none, even if it is 0. valid and class_thresholds: as in `pseudo_labels`.
    """
    kept = valid.expand(pseudo.labels.shape)
    if class_thresholds:
        kept = kept & (pseudo.weights > 0)
    return pseudo.labels.masked_fill(~kept, IGNORE_INDEX)


def class_probabilities(segment: Callable[[Tensor], Tensor], images: Tensor, *, flip: bool) -> Tensor:
    """Return the softmax of logits, `(B, K, H, W)` float32; with `flip`, the mean with the mirrored image's.

    segment: maps `(B, 3, H, W)` images to logits `(B, K, H, W)`; one call takes both views, one after the other.
    """
    if not flip:
        return segment(images).float().softmax(dim=1)
    views = segment(torch.cat([images, images.flip(3)])).float().softmax(dim=1)
    straight, mirrored = views.chunk(2)
    return (straight + mirrored.flip(3)) / 2


def pseudo_labels(
    probabilities: Tensor,
    *,
    threshold: float,
    class_thresholds: float,
    image_weight: bool,
    class_balance: float,
    valid: Tensor,
) -> PseudoLabels:
    """Take the teacher's arg max as labels, and weigh each pixel.

    With `class_thresholds` 0, every pixel weighs q, the fraction of its image's pixels with confidence >= `threshold`.
    Above 0, a pixel weighs 1 (with `image_weight`, q) if it reaches its class's threshold (`class_wise_thresholds`),
    else 0. A teacher that is seldom sure is then followed from the start; q makes it count little until it is.
    Then the weights are multiplied by `balance_factors` of exponent `class_balance`; 0 is off.

    probabilities: `(B, K, H, W)` float32; valid: `(B, H, W)` or `(B, H, 1)` bool, False where a pseudo-label is not to
    be trusted (weight 0).
    """
    num_classes = probabilities.shape[1]
    confidence, labels = probabilities.max(dim=1)
    trusted = valid.float().expand(labels.shape)
    confident = (confidence >= threshold).float().mean(dim=(1, 2))
    weights = confident[:, None, None] * trusted
    if class_thresholds:
        thresholds = class_wise_thresholds(confidence, labels, trusted, share=class_thresholds, num_classes=num_classes)
        reached = (confidence >= thresholds).float() * trusted
        weights, confident = reached * weights if image_weight else reached, reached.mean(dim=(1, 2))
    if class_balance:
        weights = weights * balance_factors(labels, weights, exponent=class_balance, num_classes=num_classes)
    return PseudoLabels(labels.to(torch.uint8), weights, confident)


def class_wise_thresholds(
    confidence: Tensor, labels: Tensor, trusted: Tensor, *, share: float, num_classes: int
) -> Tensor:
    """Return each pixel's threshold, share * m_c / max m_c; m_c is the mean confidence of the image's class c.

    The class that the teacher is surest of has the threshold `share`; the less sure a class is, the lower its own, so
    that hard classes do not vanish from the pseudo-labels. After the self-adaptive thresholds of CBST (Zou et al. 2018,
    arXiv 1810.07911) and FlexMatch (Zhang et al. 2021, arXiv 2110.08263), here with the statistics of one image.

    confidence, trusted (0 or 1): `(B, H, W)` float32; labels: `(B, H, W)` int64. Returns `(B, H, W)` float32.
    """
    sums = _sum_by_class(labels, confidence * trusted, num_classes=num_classes)
    means = sums / _sum_by_class(labels, trusted, num_classes=num_classes).clamp(min=1.0)
    largest = means.amax(dim=1, keepdim=True).clamp(min=1 / num_classes)
    return _of_pixels(share * means / largest, labels)


def balance_factors(labels: Tensor, weights: Tensor, *, exponent: float, num_classes: int) -> Tensor:
    """Return factors f_c^-exponent that keep an image's mean weight; f_c is class c's share of the weight.

    Exponent 0.5 is square-root balance, 1 would give all classes the same weight. A class's factor is kept within
    1 / MAX_BALANCE and MAX_BALANCE of the mean, so that a few pixels do not dominate; then the mean is restored.

    labels: `(B, H, W)` int64; weights: `(B, H, W)` float32 >= 0. Returns `(B, H, W)` float32; 1 if nothing weighs.
    """
    sums = _sum_by_class(labels, weights, num_classes=num_classes)
    shares = sums / sums.sum(dim=1, keepdim=True).clamp(min=1e-12)
    factors = torch.where(shares > 0, shares.clamp(min=1e-12) ** -exponent, 1.0)
    factors = (factors / _mean(factors, shares)).clamp(1 / MAX_BALANCE, MAX_BALANCE)
    return _of_pixels(factors / _mean(factors, shares), labels)


def _mean(factors: Tensor, shares: Tensor) -> Tensor:
    """Return the mean of the factors, weighted by the shares, `(B, 1)`; 1 if nothing has a share."""
    mean = (factors * shares).sum(dim=1, keepdim=True)
    return torch.where(mean > 0, mean, 1.0)


def _sum_by_class(labels: Tensor, values: Tensor, *, num_classes: int) -> Tensor:
    """Sum `(B, H, W)` values over each class's pixels, `(B, K)` float64; unlike a scatter, deterministically."""
    classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1, 1)
    of_class = torch.where(labels.unsqueeze(1) == classes, values.unsqueeze(1), 0.0)
    return of_class.sum(dim=(2, 3), dtype=torch.float64)


def _of_pixels(by_class: Tensor, labels: Tensor) -> Tensor:
    """Give each pixel its class's value: `(B, K)` to `(B, H, W)` float32."""
    return by_class.float().gather(1, labels.flatten(1)).view_as(labels)
