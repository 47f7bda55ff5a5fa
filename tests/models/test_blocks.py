"""Norms in the precision of what they norm."""

import pytest
import torch
from torch import nn

from iccld.models.blocks import group_norm


def test_a_norm_equals_torchs_in_fp32():
    norm, x = group_norm(16), torch.randn(2, 16, 6, 10)
    reference = nn.GroupNorm(norm.num_groups, 16)
    reference.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), reference(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_under_autocast_a_norm_stays_in_bf16_and_close_to_fp32(layout: torch.memory_format):
    norm, x = group_norm(16), torch.randn(2, 16, 6, 10).contiguous(memory_format=layout)
    exact, weights = x.clone().requires_grad_(), torch.randn(x.shape)
    (norm(exact) * weights).sum().backward()
    low = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(low)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), norm(x), rtol=2e-2, atol=2e-2)
    (out.float() * weights).sum().backward()
    torch.testing.assert_close(low.grad.float(), exact.grad, rtol=5e-2, atol=5e-2)
