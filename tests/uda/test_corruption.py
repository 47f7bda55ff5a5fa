"""Target-like corruption: off to the bit, a function of the sample's draws alone, and of the parts that it names."""

import numpy as np
import pytest
import torch
from torch import Tensor

from iccld import rng
from iccld.uda.corruption import CorruptionDraws, corrupt, draw_corruption, mix_amplitude
from iccld.uda.settings import CorruptionConfig

SIZE = (32, 48)
NOTHING = {"fourier_band": 0.0, "jitter": 0.0, "blur_sigma": 0.0, "noise": 0.0, "block_ratio": 0.0}


def views(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, *SIZE, generator=generator), torch.rand(count, 3, *SIZE, generator=generator) ** 3


def draws_of(numbers: range, config: CorruptionConfig, device: str = "cpu") -> CorruptionDraws:
    key = {"seed": 0, "numbers": torch.tensor(list(numbers))}
    noise = rng.normal((3, *SIZE), purpose="noise", device=device, **key)
    return draw_corruption(config, noise=noise, purpose="corruption", **key)


def test_strength_zero_changes_no_bit_and_another_changes_much() -> None:
    images, targets = views()
    for strength in (0.0, 1.0):
        config = CorruptionConfig(strength=strength)
        out = corrupt(images, targets, draws_of(range(4), config), config)
        assert torch.equal(out, images) == (strength == 0.0)
        assert out.shape == images.shape and out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1


def test_it_grows_with_the_strength() -> None:
    images, targets = views()
    changes = []
    for strength in (0.01, 0.3, 1.0):
        config = CorruptionConfig(strength=strength, block_ratio=0.0)
        out = corrupt(images, targets, draws_of(range(4), config), config)
        changes.append(float((out - images).abs().mean()))
    # The blur's least sigma of 0.15 is next to nothing.
    assert changes[0] < 0.01 < changes[1] < changes[2]


def test_a_sample_does_not_depend_on_its_batch() -> None:
    config, (images, targets) = CorruptionConfig(strength=1.0), views()
    together = corrupt(images, targets, draws_of(range(4), config), config)
    pairs = [(images[i : i + 2], targets[i : i + 2], range(i, i + 2)) for i in (0, 2)]
    apart = torch.cat([corrupt(own, other, draws_of(numbers, config), config) for own, other, numbers in pairs])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)
    again = corrupt(images, targets, draws_of(range(1, 5), config), config)
    assert not torch.allclose(together, again, atol=1e-2)


def test_it_is_fp32_under_autocast_and_has_shapes_on_meta() -> None:
    config, (images, targets) = CorruptionConfig(strength=1.0), views()
    draws = draws_of(range(4), config)
    with torch.autocast("cpu", torch.bfloat16):
        under = corrupt(images, targets, draws, config)
    assert torch.equal(under, corrupt(images, targets, draws, config))
    on_meta = corrupt(images.to("meta"), targets.to("meta"), draws_of(range(4), config, "meta"), config)
    assert on_meta.shape == images.shape


def test_the_amplitude_of_low_frequencies_is_the_targets_and_the_phase_stays() -> None:
    images, targets = (view.double().numpy() for view in views(2))
    share, band = torch.tensor([1.0, 0.25]).view(-1, 1, 1, 1), torch.tensor([0.1, 0.3]).view(-1, 1, 1, 1)
    mixed = mix_amplitude(*(torch.from_numpy(view).float() for view in (images, targets)), share=share, band=band)
    rows, columns = (np.abs(np.fft.fftfreq(side) * side) for side in SIZE)
    for i in range(2):
        reach = float(band[i]) * min(SIZE)
        low = (rows[:, None] <= reach) & (columns[None] <= reach)
        own, other = np.fft.fft2(images[i]), np.fft.fft2(targets[i])
        amplitude = np.where(low, np.abs(own) + float(share[i]) * (np.abs(other) - np.abs(own)), np.abs(own))
        expected = np.fft.ifft2(amplitude * np.exp(1j * np.angle(own)))
        assert np.abs(expected.imag).max() < 1e-9
        np.testing.assert_allclose(mixed[i].numpy(), expected.real, atol=2e-6)


def test_a_band_of_zero_moves_the_mean_colour_alone() -> None:
    images, targets = views(1)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    mixed = mix_amplitude(images, targets, share=one, band=zero)
    means = targets.mean(dim=(2, 3), keepdim=True) - images.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(mixed, images + means, rtol=0, atol=1e-5)


def test_sample_i_takes_its_amplitude_from_target_i() -> None:
    config, (images, targets) = CorruptionConfig(strength=1.0, **{**NOTHING, "fourier_band": 0.1}), views(2)
    draws = draws_of(range(2), config)
    before = corrupt(images, targets, draws, config)
    other = targets.clone()
    other[1] = 1 - other[1]
    after = corrupt(images, other, draws, config)
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1], atol=1e-3)


def test_blocks_are_grey_whole_and_of_the_share_asked_for() -> None:
    config = CorruptionConfig(strength=1.0, **{**NOTHING, "block_ratio": 0.3}, block=8)
    images = torch.full((16, 3, *SIZE), 0.25)
    out = corrupt(images, images, draws_of(range(16), config), config)
    grey = (out == 0.5).all(dim=1).unflatten(1, (4, 8)).unflatten(3, (6, 8)).transpose(2, 3)
    per_block = grey.float().mean(dim=(3, 4))
    assert ((per_block == 0) | (per_block == 1)).all()
    assert abs(float(per_block.mean()) - 0.3) < 0.07


def test_noise_has_at_most_the_deviation_asked_for() -> None:
    config = CorruptionConfig(strength=0.5, **{**NOTHING, "noise": 0.1})
    images = torch.full((16, 3, *SIZE), 0.5)
    deviations = (corrupt(images, images, draws_of(range(16), config), config) - images).std(dim=(1, 2, 3))
    assert deviations.max() < 0.052 and deviations.max() > 0.03 and deviations.min() < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 1.5}, r"corruption.strength=1.5 must be between 0 and 1"),
        ({"fourier_band": float("nan")}, "corruption.fourier_band=nan"),
        ({"noise": -1.0}, r"corruption.noise=-1.0 must be 0 \(off\) or above"),
        ({"block": 0}, "corruption.block=0 must be at least 1; 16 pixels"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorruptionConfig(**settings)
