"""The whole model: its paths from images to logits."""

import pytest
import torch

from iccld.models.iccld import ICCLD
from iccld.models.settings import ModelConfig
from tests.models.factory import model_config, random_images, random_noise, tiny_model, trained_model

IMAGES = random_images(2, 3, 40, 72)


@pytest.mark.parametrize(("height", "width"), [(40, 72), (32, 64), (45, 50)])
def test_every_path_gives_logits_of_the_images_size(height: int, width: int):
    model, images = trained_model(), random_images(2, 3, height, width)
    noise = random_noise(model, images)
    for logits in (
        model.segment(images),
        model.segment_mean_latent(images),
        model.denoise_segment(images, noise=noise, num_steps=2),
    ):
        assert logits.shape == (2, 5, height, width) and bool(torch.isfinite(logits).all())


def test_denoised_latents_pass_the_statistics_both_ways():
    """A denoiser that is always right about a latent z must lead to z in the decoder's own scale."""
    model = trained_model()
    encoded, seen = model.encoder(IMAGES), []
    target = torch.randn(encoded.latent.shape, generator=torch.Generator().manual_seed(3))

    class Perfect(torch.nn.Module):
        def forward(self, z_t, t, condition):
            from iccld.diffusion import noise_from_z_0
            from iccld.models.denoiser import DenoiserOutput

            seen.append(condition)
            return DenoiserOutput(condition, noise_from_z_0(z_t, target, t, model.alpha_bar), target, condition)

    model.denoiser = Perfect()  # pyright: ignore
    got = model.denoise_segment(IMAGES, noise=random_noise(model, IMAGES), num_steps=3)
    mean, std = model.latent_mean.view(1, -1, 1, 1), model.latent_std.view(1, -1, 1, 1)
    logits = model.decoder(target * std + mean, encoded.features)
    expected = torch.nn.functional.interpolate(logits, size=IMAGES.shape[-2:], mode="bilinear")
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen[0], (encoded.latent - 0) / model.condition_std.view(1, -1, 1, 1))
    assert len(seen) == 3


def test_the_mean_latent_control_does_not_hear_the_latent():
    model = trained_model()
    first = model.segment_mean_latent(IMAGES)
    with torch.no_grad():
        model.encoder.latent_head[-1].weight.mul_(3.0)
    assert torch.equal(first, model.segment_mean_latent(IMAGES))
    with torch.no_grad():
        model.latent_mean.add_(1.0)
    assert not torch.allclose(first, model.segment_mean_latent(IMAGES))


def test_the_denoiser_is_optional_and_does_not_change_the_other_weights():
    torch.manual_seed(0)
    without = ICCLD(config=model_config(), num_classes=5, with_denoiser=False)
    assert without.denoiser is None
    weights = tiny_model(seed=0).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in without.state_dict().items())


def test_initial_weights_are_a_function_of_the_seed():
    first, second = tiny_model(seed=4).state_dict(), tiny_model(seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("with_denoiser", [True, False])
def test_an_untrained_denoiser_is_not_asked(with_denoiser: bool):
    model = ICCLD(config=model_config(), num_classes=5, with_denoiser=with_denoiser)
    kind = "untrained" if with_denoiser else "absent"
    with pytest.raises(
        ValueError, match=rf"denoise_segment: .*denoiser is {kind}.*train stage 2 first, or use segment"
    ):
        model.denoise_segment(IMAGES, noise=random_noise(model, IMAGES), num_steps=1)


def test_noise_of_another_shape_is_refused():
    model = trained_model()
    with pytest.raises(
        ValueError, match=r"noise of shape \(2, 4, 1, 1\) does not fit .*draw it with shape \(2, 4, 5, 9\)"
    ):
        model.denoise_segment(IMAGES, noise=torch.zeros(2, 4, 1, 1), num_steps=1)


def test_config_values_are_checked():
    with pytest.raises(ValueError, match=r"model\.latent_channels=0 must be at least 1"):
        ModelConfig(latent_channels=0)
    with pytest.raises(ValueError, match=r"num_classes=1 must be between 2 and 255"):
        ICCLD(config=model_config(), num_classes=1)


def test_under_bf16_a_pixel_between_two_classes_does_not_tie():
    """The lower class would win, which is the more common one."""
    model = tiny_model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model.segment(IMAGES)
    assert logits.dtype == torch.float32
    first, second = logits.topk(2, dim=1).values.unbind(dim=1)
    assert float((first == second).float().mean()) < 1e-3
