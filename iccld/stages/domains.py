"""The three domains of stage 2, one after another along the batch: source, target, and source pasted onto target.

`B H W` images of each domain; tensors of all three have `3B` samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iccld.models.encoder import EncoderOutput
from iccld.stages.base import to_float
from iccld.stages.settings import DOMAINS
from iccld.uda.classmix import class_mask, paste
from iccld.uda.pseudo_labels import PseudoLabels

LABELLED: tuple[str, ...] = ("source", "mixed")


class Images(NamedTuple):
    """Images of the domains, `(3B, 3, H, W)` float32 in [0, 1]; `pasted` `(B, H, W)` bool.

    `pasted` marks the pixels of the mixed images that come from the source.
    """

    images: Tensor
    pasted: Tensor


class Labels(NamedTuple):
    """Labels `(3B, H, W)` uint8, 255 is ignored; weights `(3B, H, W)` float32 >= 0, 1 on the source's pixels."""

    labels: Tensor
    weights: Tensor


def mixed_images(batch: Mapping[str, Any], scores: Tensor) -> Images:
    """Join source, target, and their mixtures; `scores` `(B, K)` in [0, 1) draw the classes to paste."""
    source, target = to_float(batch["source"]["images"]), to_float(batch["target"]["images"])
    pasted = class_mask(batch["source"]["labels"], scores)
    return Images(torch.cat([source, target, paste(pasted, source, target)]), pasted)


def mixed_labels(source_labels: Tensor, pseudo: PseudoLabels, pasted: Tensor) -> Labels:
    """Join the source's labels, the target's pseudo-labels, and both pasted as the images are."""
    of_target, ones = pseudo.labels.to(source_labels.dtype), torch.ones_like(pseudo.weights)
    labels = torch.cat([source_labels, of_target, paste(pasted, source_labels, of_target)])
    return Labels(labels, torch.cat([ones, pseudo.weights, paste(pasted, ones, pseudo.weights)]))


def of_domains(whole: Tensor, names: Sequence[str]) -> Tensor:
    """Select the samples of some domains, `(len(names) * B, ...)`."""
    parts = dict(zip(DOMAINS, whole.chunk(len(DOMAINS)), strict=True))
    return parts[names[0]] if len(names) == 1 else torch.cat([parts[name] for name in names])


def encoded_of(encoded: EncoderOutput, names: Sequence[str]) -> EncoderOutput:
    """Select E's output of some domains."""
    return EncoderOutput(of_domains(encoded.latent, names), tuple(of_domains(f, names) for f in encoded.features))


def joined(*parts: EncoderOutput) -> EncoderOutput:
    """Join E's output of several batches, one after another."""
    latents, features = zip(*parts, strict=True)
    return EncoderOutput(torch.cat(latents), tuple(torch.cat(level) for level in zip(*features, strict=True)))
