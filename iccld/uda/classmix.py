"""ClassMix: half of a source image's classes are pasted onto a target image (Olsson et al. 2021; DACS).

`B C H W` images, `K` classes.
"""

import torch
from torch import Tensor

from iccld import rng
from iccld.labels import IGNORE_INDEX


def class_mask(labels: Tensor, scores: Tensor) -> Tensor:
    """Choose the pixels to paste: those of ceil(n/2) of the n classes present, never ignored ones.

    labels: `(B, H, W)` integer class indices, 255 ignored; scores: `(B, K)` draws in [0, 1): the classes present with
    the highest scores are taken. Returns a bool mask `(B, H, W)`.
    """
    num_classes = scores.shape[1]
    classes = labels.long().clamp(max=num_classes)  # 255 falls into a bin of its own
    present = torch.zeros(len(labels), num_classes + 1, device=labels.device)
    present.scatter_(1, classes.flatten(1), 1.0)
    present = present[:, :num_classes]
    ranked = torch.where(present > 0, rng.to_device(scores.float(), labels.device), -1.0)
    rank = ranked.argsort(dim=1, descending=True).argsort(dim=1)
    num_taken = torch.ceil(present.sum(dim=1, keepdim=True) / 2)
    taken = torch.cat([(rank < num_taken) & (present > 0), torch.zeros_like(present[:, :1], dtype=torch.bool)], dim=1)
    return taken.gather(1, classes.flatten(1)).view_as(labels) & (labels != IGNORE_INDEX)


def paste(mask: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Take `source` inside the mask `(B, H, W)`, else `target`; both `(B, C, H, W)` or `(B, H, W)` of one dtype."""
    return torch.where(mask.unsqueeze(1) if source.dim() == 4 else mask, source, target)
