"""One attention function, and back ends that say where they cannot run."""

import builtins
import math

import pytest
import torch

from iccld.models.attention import _try_xformers, attention, check_backend
from iccld.models.denoiser import Denoiser
from iccld.models.settings import AttentionBackend, DenoiserConfig


def loop_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(q)
    batch, tokens, heads, dim = q.shape
    for b in range(batch):
        for m in range(heads):
            for i in range(tokens):
                scores = torch.stack([q[b, i, m] @ k[b, j, m] / math.sqrt(dim) for j in range(tokens)]).softmax(0)
                out[b, i, m] = sum(scores[j] * v[b, j, m] for j in range(tokens))
    return out


def test_sdpa_equals_the_loop():
    q, k, v = torch.randn(3, 2, 7, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(q, k, v, AttentionBackend.sdpa), loop_attention(q, k, v), rtol=1e-4, atol=1e-5)


def test_sdpa_runs_anywhere():
    check_backend(AttentionBackend.sdpa, "cpu")


def test_xformers_without_cuda_is_refused():
    with pytest.raises(ValueError, match=r"model\.denoiser\.attention=xformers needs a CUDA device.*attention=sdpa"):
        check_backend(AttentionBackend.xformers, "cpu")


def test_xformers_that_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.startswith("xformers"):
            raise ImportError("built for another torch")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ValueError, match=r"xformers cannot be imported \(built for another torch\); install .*sdpa"):
        check_backend(AttentionBackend.xformers, "cuda")


def test_the_denoiser_checks_at_construction(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = DenoiserConfig(width=16, head_dim=16, attention=AttentionBackend.xformers)
    with pytest.raises(ValueError, match=r"model\.denoiser\.attention=xformers needs a CUDA device"):
        Denoiser(config=config, latent_channels=4, condition_channels=4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_equals_sdpa_in_outputs_and_gradients(dtype: torch.dtype):
    check_backend(AttentionBackend.xformers, "cuda")
    results = []
    for backend in AttentionBackend:
        generator = torch.Generator("cuda").manual_seed(0)
        qkv = torch.randn(3, 2, 64, 4, 32, generator=generator, device="cuda", dtype=dtype).requires_grad_()
        out = attention(*qkv.unbind(), backend)
        out.float().square().sum().backward()
        results.append((out, qkv.grad))
    tolerance = 1e-3 if dtype is torch.float32 else 5e-2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_xformers_without_operators_for_this_device_is_refused(monkeypatch: pytest.MonkeyPatch):
    """A build for another CUDA can be imported; a call says that it has nothing to run."""
    monkeypatch.setattr("iccld.models.attention._try_xformers", lambda _: _try_xformers(torch.device("cpu")))
    with pytest.raises(ValueError, match=r"has no operator that runs here \(No operator .*attention=sdpa"):
        check_backend(AttentionBackend.xformers, "cuda")
