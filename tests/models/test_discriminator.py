"""The discriminator, and the mask encoder beside it: small convolutional networks over latents and labels."""

import pytest
import torch
from torch.func import functional_call

from iccld.models.discriminator import Discriminator
from iccld.models.mask_encoder import MaskEncoder
from iccld.models.settings import DiscriminatorConfig
from tests.models.factory import random_images, without_gradient

T = torch.tensor([0, 999])


def make_discriminator() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(config=DiscriminatorConfig(width=8), in_channels=4, num_domains=3)


@pytest.mark.parametrize(("size", "out"), [((4, 8), (1, 1)), ((1, 1), (1, 1)), ((64, 64), (8, 8)), ((9, 17), (2, 3))])
def test_any_latent_gives_logits_of_three_domains(size: tuple[int, int], out: tuple[int, int]):
    discriminator = make_discriminator()
    logits = discriminator(random_images(2, 4, *size), T)
    assert logits.shape == (2, 3, *out)
    logits.square().mean().backward()
    assert not without_gradient(discriminator)


def test_the_timestep_is_heard_and_samples_do_not_mix():
    discriminator, x = make_discriminator(), random_images(2, 4, 8, 8)
    logits = discriminator(x, T)
    assert not torch.allclose(logits, discriminator(x, T.flip(0)), atol=1e-6)
    torch.testing.assert_close(discriminator(x[1:], T[1:]), logits[1:])


def test_detached_parameters_pass_the_gradient_to_the_input_only():
    discriminator, x = make_discriminator(), random_images(2, 4, 8, 8).requires_grad_()
    frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
    functional_call(discriminator, frozen, (x, T)).square().mean().backward()
    assert x.grad is not None and bool(x.grad.any())
    assert all(p.grad is None for p in discriminator.parameters())


@pytest.mark.parametrize(("settings", "name"), [({"width": 1}, "width=1"), ({"num_layers": 0}, "num_layers=0")])
def test_config_values_are_checked(settings: dict, name: str):
    with pytest.raises(ValueError, match=rf"model\.discriminator\.{name} must be at least"):
        DiscriminatorConfig(**settings)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_mask_encoder_has_stride_8(dtype: torch.dtype):
    encoder = MaskEncoder(num_classes=5, latent_channels=4, width=8)
    latent = encoder(torch.randint(0, 5, (2, 48, 60)).to(dtype))
    assert latent.shape == (2, 4, 6, 8)
    latent.square().mean().backward()
    assert not without_gradient(encoder)


def test_ignored_pixels_are_all_zero_to_the_mask_encoder():
    encoder = MaskEncoder(num_classes=5, latent_channels=4, width=8)
    seen = []
    encoder.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    labels = torch.tensor([[[0, 4, 255, 2]]], dtype=torch.uint8)
    encoder(labels)
    expected = torch.zeros(1, 5, 1, 4)
    expected[0, 0, 0, 0] = expected[0, 4, 0, 1] = expected[0, 2, 0, 3] = 1.0
    assert torch.equal(seen[0], expected)
