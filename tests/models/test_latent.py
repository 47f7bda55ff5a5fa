"""The seam: what is diffused, what conditions it, and their unit variance."""

import pytest
import torch

from iccld.models.encoder import EncoderOutput
from iccld.models.iccld import ICCLD
from iccld.models.latent import channel_moments, denormalise, moments_to_statistics, normalise
from iccld.models.settings import LatentKind
from tests.models.factory import random_images, tiny_model

CLEAN, STRONG = random_images(2, 3, 32, 64, seed=0), random_images(2, 3, 32, 64, seed=1)
LABELS = torch.randint(0, 5, (2, 32, 64), generator=torch.Generator().manual_seed(2)).to(torch.uint8)


def views(model: ICCLD) -> dict[str, torch.Tensor]:
    """E's latent of the clean view and of the one that the reading conditions on, and the labels."""
    clean, strong = model.encoder(CLEAN).latent, model.encoder(STRONG).latent
    return {"clean": clean, "seen": strong if model.config.latent.sees_strong_view else clean, "labels": LABELS}


def test_image_reading_diffuses_the_clean_latent_given_the_strong_view():
    model = tiny_model(latent=LatentKind.image)
    seen = views(model)["seen"]
    z_0 = model.encoded_z_0(views(model)["clean"], None)
    assert torch.equal(z_0, model.encoder(CLEAN).latent) and LatentKind.image.sees_strong_view
    assert not torch.allclose(z_0, seen, atol=1e-3), "copying the condition must not solve the task"


def test_mask_reading_diffuses_the_label_given_the_clean_view():
    model = tiny_model(latent=LatentKind.mask)
    assert model.mask_encoder is not None
    z_0 = model.encoded_z_0(None, LABELS)
    assert torch.equal(z_0, model.mask_encoder(LABELS)) and not LatentKind.mask.sees_strong_view
    assert z_0.shape == model.encoder(CLEAN).latent.shape


@pytest.mark.parametrize("kind", [LatentKind.image, LatentKind.mask])
def test_measured_statistics_give_unit_variance(kind: LatentKind):
    model = tiny_model(latent=kind)
    with torch.no_grad():
        raw, condition = model.encoded_z_0(views(model)["clean"], LABELS), views(model)["seen"]
        halves = [(channel_moments(raw[s]), channel_moments(condition[s])) for s in (slice(0, 1), slice(1, 2))]
        model.set_latent_statistics(z_0=halves[0][0] + halves[1][0], condition=halves[0][1] + halves[1][1])
        seen = views(model)["seen"]
        condition = normalise(seen, mean=model.condition_mean, std=model.condition_std)
        of_z_0 = {"clean": views(model)["clean"], "labels": LABELS, "weights": None}
        z_0 = model.diffused_latent(seen=EncoderOutput(seen, ()), **of_z_0)
        for z in (z_0, condition):
            assert z.dtype == torch.float32
            torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
            torch.testing.assert_close(z.std(dim=(0, 2, 3), correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_moments_of_parts_add_up_to_those_of_the_whole():
    z = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 100
    mean, std = moments_to_statistics(channel_moments(z[:2]) + channel_moments(z[2:]))
    torch.testing.assert_close(mean, z.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(std, z.std(dim=(0, 2, 3), correction=0), rtol=1e-4, atol=1e-4)


def test_denormalise_is_the_inverse_of_normalise():
    z, mean, std = torch.randn(2, 3, 4, 4), torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.1, 3.0, 1.0])
    torch.testing.assert_close(denormalise(normalise(z, mean=mean, std=std), mean=mean, std=std), z)


def test_a_constant_channel_does_not_blow_up():
    mean, std = moments_to_statistics(channel_moments(torch.full((1, 2, 4, 4), 7.0)))
    assert mean.tolist() == [7.0, 7.0] and std.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("z", [torch.full((1, 2, 2, 2), float("nan")), torch.zeros(0, 2, 2, 2)])
def test_unusable_latents_are_refused(z: torch.Tensor):
    with pytest.raises(ValueError, match="latent statistics: the latents measured are not finite, or none were"):
        moments_to_statistics(channel_moments(z))
