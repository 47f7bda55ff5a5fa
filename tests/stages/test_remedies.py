"""Conditions, latents, pseudo-labels and the adversary's input of stage 2, each on its own."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from iccld.models.condition import ConditionParts
from iccld.models.encoder import EncoderOutput
from iccld.models.iccld import ICCLD
from iccld.models.settings import ConditionKind, LatentKind
from iccld.stages.adversarial import AdversarialStage, noise_shapes
from iccld.stages.base import to_float
from iccld.stages.named import tensors_to_condition
from iccld.stages.settings import AdversaryInput, PseudoLabelSource
from iccld.uda.settings import CorruptionConfig
from tests.factory import papers_objective, random_batch, tiny_model_config
from tests.stages.test_adversarial import make_stage

IMAGES = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
RESIDUAL, RICH, OWN = LatentKind.residual, ConditionKind.rich, PseudoLabelSource.denoiser
CORRUPTION = CorruptionConfig(strength=1.0)


def tensors_of(stage: AdversarialStage) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return stage.prepare(random_batch(num_classes=19, numbers=range(4)), 0).tensors


def images_seen_by_e(stage: AdversarialStage) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    hook = stage.model.encoder.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    tensors_of(stage)
    hook.remove()
    return seen


def spread(model: ICCLD) -> ICCLD:
    """Give the model statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for name in ("latent", "condition"):
        model.get_buffer(f"{name}_mean").copy_(torch.rand(4, generator=generator) - 0.5)
        model.get_buffer(f"{name}_std").copy_(torch.rand(4, generator=generator) + 0.5)
    return model


@pytest.mark.parametrize("condition", ConditionKind)
def test_an_untrained_residual_gives_stage_1_exactly(condition: ConditionKind):
    for model in make_stage(latent=RESIDUAL, condition=condition).assemble_models().values():
        with torch.no_grad():
            expected = spread(model).segment(IMAGES)
            assert torch.equal(model.denoise_segment(IMAGES, noise=torch.randn(2, 4, 4, 8), num_steps=1), expected)
            assert torch.equal(model.segment_mean_latent(IMAGES), expected), "no move is the mean move"


def test_a_trained_residual_moves_the_latent_by_its_scale():
    model = spread(make_stage(latent=RESIDUAL).model)
    with torch.no_grad():
        encoded, move = model.encoder(IMAGES), torch.randn(2, 4, 4, 8)
        moved = model.decodable(move, encoded.latent)
    unit = model.config.residual_steps * model.config.residual_step * model.latent_std.view(1, -1, 1, 1)
    torch.testing.assert_close(moved - encoded.latent, unit * move)


def residual_of(model: ICCLD, encoded: EncoderOutput, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return model.diffused_latent(clean=None, seen=encoded, labels=labels, weights=weights)


def test_the_residual_leads_towards_the_labels_and_no_sample_hears_another():
    model = spread(make_stage(latent=RESIDUAL).model)
    labels = torch.randint(0, 19, (2, 32, 64), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    weights = torch.ones(2, 32, 64)
    with torch.no_grad():
        encoded = model.encoder(IMAGES)
        r = residual_of(model, encoded, labels, weights)
        assert not r.requires_grad and r.dtype == torch.float32

        def loss(z_0: torch.Tensor) -> torch.Tensor:
            logits = model.decoder(model.decodable(z_0, encoded.latent), encoded.features)
            logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear")
            return F.cross_entropy(logits, labels.long(), reduction="none").mean(dim=(1, 2))

        assert bool((loss(r) < loss(torch.zeros_like(r))).all())
        root_mean_square = r.square().mean(dim=(1, 2, 3)).sqrt()
        assert bool((root_mean_square <= 1 + 1e-5).all()) and bool((root_mean_square > 0.3).all())
        alone = [residual_of(model, encoded_at(encoded, i), labels[i : i + 1], weights[i : i + 1]) for i in (0, 1)]
        torch.testing.assert_close(torch.cat(alone), r, rtol=1e-3, atol=1e-4)
        half = residual_of(model, encoded, labels, weights * torch.tensor([1.0, 0.5]).view(2, 1, 1))
        torch.testing.assert_close(half[0], r[0])
        assert float(half[1].square().mean()) < 0.5 * float(r[1].square().mean()), "what is trusted less moves less"
        nothing = residual_of(model, encoded, torch.full_like(labels, 255), weights)
        assert not nothing.any()


def encoded_at(encoded: Any, i: int) -> Any:
    return type(encoded)(encoded.latent[i : i + 1], tuple(f[i : i + 1] for f in encoded.features))


def test_the_last_timestep_of_a_residual_is_pure_noise():
    stage = make_stage(latent=RESIDUAL)
    stage.views.uniform = lambda count, purpose, numbers: torch.full((len(numbers), count), 0.9999)  # t = 999
    tensors = tensors_of(stage)
    assert bool(tensors["is_pure"].all()) and torch.equal(tensors["z_t"], tensors["noise"])


def test_stage_1_of_the_image_reading_serves_for_a_residual_and_none_of_masks():
    config = tiny_model_config()
    model = ICCLD(config=config, num_classes=19, with_denoiser=False)
    model.start_denoiser(replace(config, latent=RESIDUAL, condition=RICH, residual_steps=2))
    assert model.denoiser is not None and model.denoiser.starts_at_zero and model.denoiser.rich is not None
    assert (model.config.latent, model.config.residual_steps) == (RESIDUAL, 2)
    with pytest.raises(ValueError, match=r"model.latent=mask needs a stage 1 of its own.*trained with residual"):
        model.start_denoiser(replace(config, latent=LatentKind.mask))


def test_only_the_labelled_images_are_corrupted_and_the_clean_latent_is_not():
    plain, corrupted = make_stage(), make_stage(corruption=CORRUPTION)
    before, after = images_seen_by_e(plain), images_seen_by_e(corrupted)
    assert len(before) == len(after) == 24
    changed = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert changed == [False] * 12 + [True] * 4 + [False] * 4 + [True] * 4
    assert torch.equal(tensors_of(plain)["z_0"], tensors_of(corrupted)["z_0"])


def test_corruption_of_a_mask_readings_condition_costs_one_more_pass_of_the_target():
    stage = make_stage(latent=LatentKind.mask, corruption=CORRUPTION)
    assert len(images_seen_by_e(stage)) == 12 + 4


def test_every_part_of_a_rich_condition_is_heard():
    stage = make_stage(condition=RICH)
    tensors = tensors_of(stage)
    condition = tensors_to_condition(tensors)
    assert isinstance(condition, ConditionParts) and condition.latent.shape[-2:] == condition.probabilities.shape[-2:]
    torch.testing.assert_close(condition.probabilities.sum(dim=1), torch.ones(12, 4, 8))
    arguments = tensors["z_t"], tensors["t"]
    base = stage.module.denoiser(*arguments, condition).z_0_pred
    parts = {name: getattr(condition, name).flip(-1) for name in ("latent", "probabilities", "images")}
    for i, level in enumerate(condition.features):
        features = [*condition.features]
        features[i] = level.roll(1, dims=1)
        parts[f"features {i}"] = features
    for name, value in parts.items():
        changed = stage.module.denoiser(*arguments, condition._replace(**{name.split()[0]: value})).z_0_pred
        assert not torch.allclose(base, changed, atol=1e-5), name


def test_what_makes_a_rich_condition_is_the_denoisers_own():
    stage = make_stage(condition=RICH)
    of_rich = {id(p) for p in stage.module.denoiser.rich.parameters()}
    assert of_rich <= {id(p) for group in stage.param_groups() for p in group["params"]}
    teacher = {name for name, _ in stage.teacher.module.named_parameters()}
    assert {name for name in teacher if name.startswith("rich.")}


@pytest.mark.parametrize("size", [(32, 64), (40, 56)])
def test_a_rich_residual_model_is_saved_whole(tmp_path: Path, size: tuple[int, int]):
    model = spread(make_stage(condition=RICH, latent=RESIDUAL).model).eval()
    with torch.no_grad():
        model.denoiser.head[-1].weight.normal_()
    names = [f"class {i}" for i in range(19)]
    model.save_pretrained(tmp_path, class_names=names, palette=[(i, i, i) for i in range(19)])
    loaded = ICCLD.from_pretrained(tmp_path)
    images, noise = torch.rand(1, 3, *size), torch.randn(1, *model.latent_shape(*size))
    with torch.no_grad():
        for num_steps in (1, 3):
            maps = [m.denoise_segment(images, noise=noise, num_steps=num_steps) for m in (model, loaded)]
            assert torch.equal(*maps) and maps[0].shape[-2:] == size


@pytest.mark.parametrize("flip", [False, True])
def test_the_denoisers_average_is_half_of_the_pseudo_labels(flip: bool):
    """The denoiser's maps are known: those that D gives for the latent that it is made to predict."""
    stage = make_stage(pseudo_labels=OWN, flip_teacher=flip, latent=LatentKind.mask)
    batch = random_batch(num_classes=19, numbers=range(4))
    images, model = batch["target"]["images"].float() / 255, stage.model
    with torch.no_grad():
        tensors = stage.views(batch)
        shape = (4, *model.latent_shape(32, 64))
        wanted = torch.randn(1, *shape[1:]).expand(shape)

        class Known(torch.nn.Module):
            def forward(self, z_t: Any, t: Any, condition: Any) -> Any:
                output = stage.module.denoiser(z_t, t, condition)
                assert bool((t == 999).all()) and z_t.std() > 0.5
                return output._replace(z_0_pred=wanted.repeat(len(z_t) // 4, 1, 1, 1))

        views = [images, images.flip(3)] if flip else [images]
        maps = []
        for view in views:
            encoded = model.encoder(view)
            stage_1 = model.decode(encoded, (32, 64)).softmax(1)
            latent = model.decodable(wanted, encoded.latent)
            mean = (stage_1 + model.decode(encoded._replace(latent=latent), (32, 64)).softmax(1)) / 2
            maps.append(mean if view is images else mean.flip(3))
        expected = torch.stack(maps).mean(0).argmax(1).to(torch.uint8)
        got = stage.views.with_denoiser_labels(batch, tensors, Known())  # pyright: ignore[reportArgumentType]
        of_labels = model.mask_encoder(expected)
        torch.testing.assert_close(got["z_0"].chunk(3)[1], of_labels, rtol=1e-3, atol=1e-3)
        assert not any(name.startswith(("target_", "pasted", "clean_")) for name in got)


def test_the_student_labels_nothing():
    stage = make_stage(pseudo_labels=OWN, task_weight=1.0)
    before = tensors_of(stage)
    with torch.no_grad():
        for p in stage.module.denoiser.parameters():
            p.normal_()
    after = tensors_of(stage)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_map_adversary_moves_the_target_alone():
    stage = make_stage(adversary_input=AdversaryInput.map)
    inputs = stage_inputs(stage)
    z_0 = inputs.tensors["z_0"].clone().requires_grad_()
    logits = stage.module._decoded(z_0, inputs.tensors)
    assert logits.keys() == {"source", "target"}
    adversary_input = torch.cat([*logits.values()]).softmax(1)
    stage.module._confusion(adversary_input, inputs.tensors["t"][:8]).backward()
    source, target, mixed = z_0.grad.chunk(3)
    assert bool(target.any()) and not source.any() and not mixed.any()
    assert stage.module.discriminator.head.out_channels == 2
    assert float(inputs.denominators["adversarial"]) == 4 and float(inputs.denominators["discriminator"]) == 8
    metrics = stage.module(inputs).metrics
    assert [name for name in metrics if "t_bin" not in name] == ["accuracy/source", "accuracy/target"]


def stage_inputs(stage: AdversarialStage) -> Any:
    with torch.no_grad():
        return stage.prepare(random_batch(num_classes=19, numbers=range(4)), 0)


def test_the_stream_draws_the_noise_that_a_step_asks_for():
    shapes = {"latent": (4, 4, 8), "crop_size": [32, 64]}
    config = papers_objective(pseudo_labels=OWN, flip_teacher=True, corruption=CORRUPTION)
    found = noise_shapes(config, **shapes)
    batch = random_batch(num_classes=19, numbers=range(2))
    asked = {name: torch.randn(2, *shape) for name, shape in found.items()}
    stage = make_stage(pseudo_labels=OWN, flip_teacher=True, corruption=CORRUPTION, task_weight=1.0)
    drawn = copy.deepcopy(batch)
    with torch.no_grad():
        batch["source"] |= {name: torch.zeros_like(noise) for name, noise in asked.items()}
        given, own = stage.prepare(batch, 0).tensors, stage.prepare(drawn, 0).tensors
    assert not given["noise"].any() and own["noise"].any()
    assert len(found) == 6 and not noise_shapes(
        replace(config, deterministic=True, corruption=CorruptionConfig()), **shapes
    )


def test_pseudo_labels_that_no_loss_asks_for_are_refused():
    with pytest.raises(ValueError, match=r"pseudo_labels=denoiser changes nothing .* set stage2.objective.task_weight"):
        make_stage(pseudo_labels=OWN)


def test_a_trust_above_1_lengthens_no_step_of_the_residual():
    stage = make_stage(latent=LatentKind.residual)
    images = random_batch(num_classes=19, numbers=range(2))["source"]["images"]
    labels = random_batch(num_classes=19, numbers=range(2))["source"]["labels"]
    encoded = stage.model.encoder(to_float(images))
    plain, heavy = (residual_of(stage.model, encoded, labels, torch.full(labels.shape, w)) for w in (1.0, 4.0))
    assert heavy.square().mean().sqrt() <= 1.0
    torch.testing.assert_close(plain, heavy, rtol=1e-3, atol=1e-4)
