"""Stage 2: the adversarial gradient goes where it should, and one engine equals two optimisers."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.func import functional_call

from iccld.labels import IGNORE_INDEX
from iccld.losses import domain_confusion, domain_cross_entropy, latent_mse
from iccld.models.iccld import ICCLD
from iccld.models.settings import ConditionKind, LatentKind
from iccld.stages.adversarial import AdversarialStage, new_discriminator
from iccld.stages.domains import mixed_images
from iccld.stages.settings import AdversarialConfig, AdversaryInput
from iccld.uda.settings import PhotometricConfig
from tests.factory import papers_objective, random_batch, tiny_model_config

INPUTS = list(AdversaryInput)


def make_stage(
    *,
    adversary_input: AdversaryInput = AdversaryInput.noise,
    latent: LatentKind = LatentKind.image,
    condition: ConditionKind = ConditionKind.latent,
    **settings: Any,
) -> AdversarialStage:
    torch.manual_seed(0)
    config = replace(tiny_model_config(latent=latent), condition=condition)
    model = ICCLD(config=config, num_classes=19, with_denoiser=True)
    settings = {"adversarial_ramp_steps": 0, "adversarial_weight": 1.0, "adversary_input": adversary_input} | settings
    objective = papers_objective(**settings)
    return AdversarialStage(model, new_discriminator(model, objective, config.discriminator), objective, seed=0)


def prepared(stage: AdversarialStage, step: int = 0):
    with torch.no_grad():
        return stage.prepare(random_batch(num_classes=19, numbers=range(4 * step, 4 * step + 4)), step)


@pytest.mark.parametrize("adversary_input", INPUTS)
def test_the_adversarial_term_reaches_the_denoiser_and_not_the_discriminator(adversary_input: AdversaryInput):
    stage = make_stage(adversary_input=adversary_input)
    stage.module(prepared(stage)).losses["adversarial"].backward()
    denoiser = [p.grad for p in stage.module.denoiser.parameters()]
    assert any(g is not None and g.abs().sum() > 0 for g in denoiser)
    assert all(p.grad is None or not p.grad.any() for p in stage.module.discriminator.parameters())


@pytest.mark.parametrize("adversary_input", INPUTS)
def test_the_discriminators_term_stops_at_its_input(adversary_input: AdversaryInput):
    stage = make_stage(adversary_input=adversary_input)
    stage.module(prepared(stage)).losses["discriminator"].backward()
    assert all(p.grad is None or not p.grad.any() for p in stage.module.denoiser.parameters())
    assert all(p.grad is not None for p in stage.module.discriminator.parameters())


@pytest.mark.parametrize("adversary_input", INPUTS)
def test_a_step_along_the_adversarial_gradient_raises_the_discriminators_loss(adversary_input: AdversaryInput):
    stage = make_stage(adversary_input=adversary_input)
    inputs = prepared(stage)
    adversary = torch.optim.Adam(stage.module.discriminator.parameters(), lr=1e-2)
    for _ in range(100):  # until it tells the domains apart, and before it is so sure that its loss is 0
        adversary.zero_grad()
        before = stage.module(inputs).losses
        if before["discriminator"] < 0.5:
            break
        before["discriminator"].backward()
        adversary.step()
    assert before["discriminator"] < 0.5
    stage.module.zero_grad()
    before["adversarial"].backward()
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in stage.module.denoiser.parameters() if p.grad is not None]).norm()
        for p in stage.module.denoiser.parameters():
            if p.grad is not None:
                p -= 1e-2 * p.grad / norm
    after = stage.module(inputs).losses
    assert after["adversarial"] < before["adversarial"]
    assert after["discriminator"] > before["discriminator"]


@pytest.mark.parametrize("latent", list(LatentKind))
def test_encoder_and_decoder_do_not_change_by_a_bit(latent: LatentKind):
    stage = make_stage(latent=latent)
    frozen = [part for part in (stage.model.encoder, stage.model.decoder, stage.model.mask_encoder) if part is not None]
    before = [copy.deepcopy(part.state_dict()) for part in frozen]
    optimizer = torch.optim.AdamW(stage.param_groups())
    for step in range(2):
        optimizer.zero_grad()
        torch.stack(list(stage.module(prepared(stage, step)).losses.values())).sum().backward()
        optimizer.step()
        stage.after_step(step)
    trained = {id(p) for group in stage.param_groups() for p in group["params"]}
    assert trained == {id(p) for p in stage.module.parameters()}
    for part, state in zip(frozen, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())
        assert all(p.grad is None and id(p) not in trained for p in part.parameters())


@pytest.mark.parametrize(("latent", "images_a_sample"), [(LatentKind.image, 6), (LatentKind.mask, 3)])
def test_the_encoder_sees_each_image_once_a_step(latent: LatentKind, images_a_sample: int):
    """Source, target and mixed, and the strong view of each where the latent is of the image."""
    always = PhotometricConfig(jitter_probability=1.0)  # no strong view is the clean one
    stage, encoded = make_stage(latent=latent, photometric=always), []
    hook = stage.model.encoder.register_forward_pre_hook(lambda _, inputs: encoded.extend(inputs[0]))
    inputs = prepared(stage)
    hook.remove()
    stage.module(inputs)
    assert len(encoded) == 4 * images_a_sample
    assert not any(torch.equal(one, other) for i, one in enumerate(encoded) for other in encoded[:i])


def test_the_targets_labels_are_what_the_model_segments():
    stage, batch = make_stage(latent=LatentKind.mask), random_batch(num_classes=19, numbers=range(4))
    with torch.no_grad():
        target = batch["target"]["images"].float() / 255
        expected = stage.model.segment(target).argmax(dim=1).to(torch.uint8)
        clean, labels = stage.model.encoder(target), expected.repeat(3, 1, 1)
        z_0 = stage.model.diffused_latent(clean=None, seen=clean, labels=labels, weights=None)
        torch.testing.assert_close(prepared(stage).tensors["z_0"].chunk(3)[1], z_0.chunk(3)[1])


def two_optimiser_step(stage: AdversarialStage, inputs: Any, optimisers: list[torch.optim.Optimizer]) -> list[float]:
    """The textbook step: the denoiser against a frozen discriminator, then the discriminator on detached
    predictions.
    """
    tensors, denominators = inputs
    module = stage.module
    for optimiser in optimisers:
        optimiser.zero_grad()
    for p in module.discriminator.parameters():
        p.requires_grad_(False)
    noise_pred = module.denoiser(tensors["z_t"], tensors["t"], tensors["condition"]).noise_pred
    errors = latent_mse(noise_pred, tensors["noise"])
    mse = (tensors["diffusion_weights"] * errors).sum() / denominators["diffusion"]
    confusion = domain_confusion(module.discriminator(noise_pred, tensors["t"])).sum() / denominators["adversarial"]
    generator_loss = mse + tensors["adversarial_weight"] * confusion
    generator_loss.backward()
    for p in module.discriminator.parameters():
        p.requires_grad_(True)
    logits = module.discriminator(noise_pred.detach(), tensors["t"])
    loss = domain_cross_entropy(logits, tensors["domains"]).sum() / denominators["adversarial"]
    loss.backward()
    for optimiser in optimisers:
        optimiser.step()
    return [generator_loss.item(), loss.item()]


def test_one_engine_equals_two_optimisers_to_the_bit():
    single, double = make_stage(), make_stage()
    optimiser = torch.optim.AdamW(single.param_groups())
    *denoiser_groups, discriminator_group = double.param_groups()
    pair = [torch.optim.AdamW(denoiser_groups), torch.optim.AdamW([discriminator_group])]
    for step in range(6):
        inputs = prepared(single, step)
        optimiser.zero_grad()
        losses = single.module(inputs).losses
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
        two_optimiser_step(double, inputs, pair)
    for one, two in zip(single.module.parameters(), double.module.parameters(), strict=True):
        assert torch.equal(one, two)


def test_functional_call_sees_the_discriminator_of_now():
    stage = make_stage()
    frozen = {name: p.detach() for name, p in stage.module.discriminator.named_parameters()}
    x, t = torch.randn(2, stage.model.config.latent_channels, 8, 8), torch.tensor([3, 900])
    assert torch.equal(functional_call(stage.module.discriminator, frozen, (x, t)), stage.module.discriminator(x, t))


def test_a_domain_of_weight_zero_leaves_the_diffusion_term():
    stage = make_stage(domain_weights=[1.0, 0.0, 1.0])
    inputs = prepared(stage)
    before = stage.module(inputs).losses["diffusion"]
    inputs.tensors["noise"][inputs.tensors["domains"] == 1] += 1.0
    assert torch.equal(stage.module(inputs).losses["diffusion"], before)


def test_discriminator_accuracy_is_counted_per_domain_and_timestep_bin():
    stage = make_stage()
    metrics = stage.module(prepared(stage)).metrics
    assert sum(metrics[f"accuracy/{d}"][1] for d in ("source", "target", "mixed")) == 12
    assert sum(metrics[f"accuracy/t_bin_{i}"][1] for i in range(4)) == 12


def test_ignored_source_pixels_are_no_class_to_paste():
    batch = random_batch(num_classes=19, numbers=range(4))
    batch["source"]["labels"].fill_(IGNORE_INDEX)
    _, target, mixed = mixed_images(batch, torch.rand(4, 19)).images.chunk(3)
    assert torch.equal(target, mixed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domain_weights": [1.0, 1.0]}, r"domain_weights=\[1.0, 1.0\] must be three weights"),
        ({"domain_weights": [0.0, 0.0, 0.0]}, "not all 0"),
        ({"adversarial_weight": -1.0}, r"adversarial_weight=-1.0 must be 0 \(off\) or above"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        AdversarialConfig(**settings)
