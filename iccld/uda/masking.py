"""Block masks for masked consistency (MIC, Hoyer et al. 2023)."""

import torch
from torch import Tensor


def block_mask(draws: Tensor, *, height: int, width: int, ratio: float) -> Tensor:
    """Return the visible pixels, `(B, 1, H, W)` float of 0 and 1, from block draws `(B, rows, columns)` in [0, 1).

    A block is hidden if its draw falls below `ratio`.
    """
    visible = (draws >= ratio).float().unsqueeze(1)
    rows = torch.arange(height, device=draws.device) * draws.shape[1] // height
    columns = torch.arange(width, device=draws.device) * draws.shape[2] // width
    return visible[:, :, rows][:, :, :, columns]
