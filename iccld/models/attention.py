"""Attention through one function with an explicit back end; the only file that imports xformers.

`B` batch, `N` tokens, `M` heads, `D` channels of a head.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from iccld.models.settings import AttentionBackend


def default_device_type() -> str:
    """Return the kind of device that this process would train on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_backend(backend: AttentionBackend, device_type: str) -> None:
    """Raise ValueError if `backend` cannot run on devices of `device_type` ("cuda", "cpu", ...)."""
    if backend is not AttentionBackend.xformers:
        return
    setting = "model.denoiser.attention=xformers"
    if device_type != "cuda":
        raise ValueError(
            f"{setting} needs a CUDA device, and this is {device_type!r} (xformers has no operator for it); "
            f"use model.denoiser.attention=sdpa."
        )
    remedy = f"install the xformers build of torch {torch.__version__}, or use model.denoiser.attention=sdpa"
    try:
        import xformers.ops  # noqa: F401  (slow to import and noisy, so only where it is chosen)
    except (ImportError, OSError) as error:
        raise ValueError(f"{setting}: xformers cannot be imported ({error}); {remedy}.") from error
    try:  # a build for another CUDA can be imported, and has no operators
        _try_xformers(torch.device(device_type))
    except (NotImplementedError, RuntimeError, OSError) as error:
        reason = _reason(str(error))
        raise ValueError(f"{setting}: xformers has no operator that runs here ({reason}); {remedy}.") from error


def _reason(said: str) -> str:
    """Shorten xformers' words: of each operator, why it does not run here."""
    lines = [line.strip() for line in said.splitlines()]
    told = [line for line in lines if line and not re.match(r"(query|key|value|attn_bias|p) *:", line)]
    return " ".join(told)[:500]


@torch.inference_mode(False)
@torch.enable_grad()
def _try_xformers(device: torch.device) -> None:
    """Run attention and its backward pass once on a few tokens, in both precisions that train."""
    for dtype in (torch.bfloat16, torch.float32):
        qkv = torch.zeros(1, 8, 1, 8, device=device, dtype=dtype, requires_grad=True)
        attention(qkv, qkv, qkv, AttentionBackend.xformers).sum().backward()


def attention(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v; all tensors are `(B, N, M, D)` of one float dtype.

    Tensors without memory (device meta) get the shape, whatever the back end.
    """
    if backend is AttentionBackend.xformers and not q.is_meta:
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
