"""The denoiser: any size, gradients from the first step, checkpointing that changes nothing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from iccld.diffusion import noise_from_velocity
from iccld.models.blocks import SelfAttention, TimeEmbedding
from iccld.models.condition import _from_minus_1_to_1
from iccld.models.denoiser import Denoiser
from iccld.models.settings import AttentionBackend, DenoiserConfig
from tests.models.factory import random_images, without_gradient

CONFIG = DenoiserConfig(width=16, channel_multipliers=[1, 2, 4], num_blocks=2, attention_levels=[1], head_dim=16)
T = torch.tensor([0, 999])


def make_denoiser(config: DenoiserConfig = CONFIG, *, seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(config=config, latent_channels=4, condition_channels=3)


def random_inputs(height: int = 6, width: int = 10, *, seed: int = 0):
    return random_images(2, 4, height, width, seed=seed), T, random_images(2, 3, height, width, seed=seed + 1)


@pytest.mark.parametrize(("height", "width"), [(8, 16), (9, 11), (1, 1), (5, 2), (3, 17)])
def test_any_size_is_kept(height: int, width: int):
    denoiser = make_denoiser()
    velocity, noise_pred, z_0_pred, middle = denoiser(*random_inputs(height, width))
    assert velocity.shape == noise_pred.shape == z_0_pred.shape == (2, 4, height, width)
    assert middle.shape == (2, denoiser.middle_channels, -(-height // 4), -(-width // 4))


@pytest.mark.parametrize("levels", [[1], [1, 2], [1, 1, 2, 2]])
def test_any_number_of_levels(levels: list[int]):
    config = replace(CONFIG, channel_multipliers=levels, attention_levels=[])
    assert make_denoiser(config)(*random_inputs(9, 11)).noise_pred.shape == (2, 4, 9, 11)


def test_the_first_gradient_reaches_every_parameter_from_the_output_alone():
    """The gradient of an adversarial loss on the prediction must not stop at a zero-initialised last layer."""
    denoiser = make_denoiser()
    denoiser(*random_inputs()).noise_pred.square().mean().backward()
    assert not without_gradient(denoiser)
    still = [n for n, p in denoiser.named_parameters() if p.grad is not None and not bool(p.grad.any())]
    assert not [n for n in still if "bias" not in n], still
    assert denoiser.stem.weight.grad is not None and float(denoiser.stem.weight.grad.norm()) > 0


def test_the_untrained_velocity_is_near_zero_but_not_zero():
    denoiser, (z_t, t, condition) = make_denoiser(), random_inputs(16, 16)
    of_no_velocity = noise_from_velocity(z_t, torch.zeros_like(z_t), t, denoiser.alpha_bar)
    difference = denoiser(z_t, t, condition).noise_pred - of_no_velocity
    assert 0 < float(difference.detach().std()) < 0.2


def test_condition_timestep_and_latent_are_heard():
    denoiser = make_denoiser()
    z_t, t, condition = random_inputs()
    base = denoiser(z_t, t, condition).noise_pred
    for changed in ((z_t.flip(-1), t, condition), (z_t, t.flip(0), condition), (z_t, t, condition.flip(-1))):
        assert not torch.allclose(base, denoiser(*changed).noise_pred, atol=1e-5)


def test_samples_do_not_mix():
    denoiser = make_denoiser()
    z_t, t, condition = random_inputs()
    together = denoiser(z_t, t, condition).noise_pred
    alone = denoiser(z_t[1:], t[1:], condition[1:]).noise_pred
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recomputed", [True, 1, 2])
def test_activation_checkpointing_changes_no_output_and_no_gradient(recomputed: bool | int):
    plain, saving = make_denoiser(), make_denoiser(replace(CONFIG, activation_checkpointing=recomputed))
    outputs = []
    for denoiser in (plain, saving):
        output = denoiser(*random_inputs())
        (output.noise_pred.square().mean() + output.middle.mean()).backward()
        outputs.append(output)
    assert torch.equal(outputs[0].noise_pred, outputs[1].noise_pred)
    assert torch.equal(outputs[0].middle, outputs[1].middle)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad), name


def test_activation_checkpointing_keeps_fewer_activations():
    def kept(denoiser: Denoiser) -> int:
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            denoiser(*random_inputs(16, 16))
        return total

    none, finest, two, every = (
        kept(make_denoiser(replace(CONFIG, activation_checkpointing=recomputed))) for recomputed in (False, 1, 2, True)
    )
    assert every < two < finest < none and every < 0.5 * none


def test_bf16_autocast_runs():
    denoiser = make_denoiser()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = denoiser(*random_inputs())
    output.noise_pred.float().square().mean().backward()
    assert bool(torch.isfinite(output.noise_pred).all()) and not without_gradient(denoiser)


def test_initial_weights_are_a_function_of_the_seed():
    first, second = (make_denoiser(seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_self_attention_equals_torchs_multi_head_attention():
    torch.manual_seed(0)
    block, reference = SelfAttention(32, head_dim=8, backend=AttentionBackend.sdpa), torch.nn.MultiheadAttention(32, 4)
    x = torch.randn(2, 32, 3, 5)
    tokens = block.norm(x).flatten(2).permute(2, 0, 1)
    expected, _ = F.multi_head_attention_forward(
        tokens, tokens, tokens, 32, 4, block.to_qkv.weight, block.to_qkv.bias, None, None, False, 0.0,
        block.to_out.weight, block.to_out.bias, need_weights=False,
    )  # fmt: skip
    assert reference.num_heads == 4
    torch.testing.assert_close(block(x), x + expected.permute(1, 2, 0).reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_timesteps_are_told_apart():
    torch.manual_seed(0)
    embedded = TimeEmbedding(width=16, out_channels=32)(torch.arange(1000))
    assert embedded.shape == (1000, 32) and float(torch.pdist(embedded.detach()).min()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channel_multipliers": []}, r"channel_multipliers=\[\] must be positive integers"),
        ({"channel_multipliers": [1, 0]}, r"channel_multipliers=\[1, 0\]"),
        ({"width": 2}, r"model\.denoiser\.width=2 must be at least 4"),
        ({"num_blocks": 0}, r"model\.denoiser\.num_blocks=0 must be at least 1"),
        ({"head_dim": 0}, r"model\.denoiser\.head_dim=0 must be at least 1"),
        ({"activation_checkpointing": 4}, r"activation_checkpointing=4 must be true, false, or a number .* 0 to 3"),
        ({"activation_checkpointing": -1}, r"activation_checkpointing=-1 must be"),
        ({"attention_levels": [3]}, r"attention_levels=\[3\] must be between 0 and 2"),
        ({"head_dim": 48}, r"head_dim=48 must divide the 256 channels of level 1; change head_dim or width"),
    ],
)
def test_config_values_are_checked(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DenoiserConfig(**settings)


def test_the_place_that_a_rich_condition_shows_is_linspace_to_the_bit():
    for length in range(1, 300):
        assert torch.equal(_from_minus_1_to_1(length, torch.device("cpu")), torch.linspace(-1, 1, length)), length
