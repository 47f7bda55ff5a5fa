"""The objectives as functions of tensors.

Every loss is a sum over samples (or pixels), or a value per sample, so that splitting a batch over micro-batches and
ranks does not change what is optimised: the caller divides by the denominator of the global batch. `B H W` labels,
`h w` feature positions, `K` classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from iccld.labels import IGNORE_INDEX

FILLED_SHARE = 0.75  # of a position's pixels, from which on a class fills it (DAFormer)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, *, weights: Tensor | None, denominator: Tensor) -> Tensor:
    """Return sum(weights * cross entropy) / denominator, a float32 scalar (method, L1).

    logits: `(B, K, h, w)` of any stride, upsampled bilinearly to the labels' size. labels: `(B, H, W)` uint8 or int64,
    255 is ignored. weights: `(B, H, W)` float >= 0; None is 1 everywhere. denominator: scalar, the number of valid
    pixels that the sum is shared by; a mean over micro-batches may be below 1. With 0, no pixel counts: the loss is 0.
    """
    logits = logits.float()
    if logits.shape[-2:] != labels.shape[-2:]:
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE_INDEX, reduction="none")
    if weights is not None:
        losses = losses * weights
    return losses.sum() / denominator.clamp(min=1e-6)


def domain_cross_entropy(logits: Tensor, domains: Tensor) -> Tensor:
    """Return the discriminator's loss, averaged over positions: `(B,)` float32.

    logits: `(B, num_domains, h, w)`. domains: `(B,)` int64 in [0, num_domains - 1].
    """
    targets = domains.view(-1, 1, 1).expand(-1, *logits.shape[-2:])
    return F.cross_entropy(logits.float(), targets, reduction="none").mean(dim=(1, 2))


def domain_confusion(logits: Tensor) -> Tensor:
    """Return the cross entropy of `(B, num_domains, h, w)` logits to the uniform distribution: `(B,)` float32.

    It is averaged over positions. Its minimum, log(num_domains), is reached if the domains cannot be told apart. Unlike
    a flipped label it does not push the denoiser towards the marks of another domain.
    """
    return -logits.float().log_softmax(dim=1).mean(dim=(1, 2, 3))


def latent_mse(prediction: Tensor, latent: Tensor) -> Tensor:
    """Return the mean squared error of each sample, `(B,)` float32. Latents `(B, C, h, w)`."""
    return (prediction.float() - latent.float()).square().mean(dim=(1, 2, 3))


def feature_distance(
    features: Tensor, reference: Tensor, labels: Tensor, *, classes: Sequence[int], stride: int = 32
) -> Tensor:
    """Return the mean Euclidean distance to reference features, at positions that one of `classes` fills.

    features, reference: `(B, C, h, w)`, of this stride. labels: `(B, H, W)`, 255 is ignored. A float32 scalar: the mean
    over a sample's positions (0 without any), then over samples. DAFormer pools the positions of a rank's batch
    instead, which would make the objective depend on how the batch is split.
    """
    distances = torch.linalg.vector_norm(features.float() - reference.float(), dim=1)
    mask = torch.zeros_like(distances, dtype=torch.bool)
    for index in classes:
        share = F.avg_pool2d((labels == index).float().unsqueeze(1), stride, ceil_mode=True)
        mask |= share.squeeze(1) >= FILLED_SHARE
    per_sample = (distances * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1)
    return per_sample.mean()
