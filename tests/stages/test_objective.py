"""The terms of stage 2's objective: what each is of, where its gradient goes, and that a batch may be split."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from iccld.diffusion import add_noise
from iccld.labels import IGNORE_INDEX
from iccld.losses import latent_mse, weighted_cross_entropy
from iccld.models.settings import ConditionKind, LatentKind
from iccld.stages.adversarial import AdversarialStage
from iccld.stages.base import StageInputs
from iccld.stages.denoising import Noised, denoising_errors, draw_timesteps, noised
from iccld.stages.settings import AdversarialConfig, AdversaryInput, DiffusionLoss, PseudoLabelSource
from iccld.uda.settings import CorruptionConfig
from tests.factory import random_batch
from tests.models.factory import without_gradient
from tests.stages.test_adversarial import make_stage

VELOCITY, LAST = DiffusionLoss.velocity, 999
TASK = {"task_weight": 1.0, "confidence_threshold": 0.09}  # an untrained model is confident in some pixels
SETTINGS: dict[str, dict[str, Any]] = {
    "velocity": {"diffusion_loss": VELOCITY},
    "pure noise": {"pure_noise_share": 0.5},
    "task": TASK,
    "task, mask": {**TASK, "latent": LatentKind.mask, "pure_noise_share": 0.8},
    "corruption": {"corruption": CorruptionConfig(strength=1.0), **TASK},
    "corruption, mask": {"corruption": CorruptionConfig(strength=1.0), "latent": LatentKind.mask},
    "rich": {"condition": ConditionKind.rich, **TASK},
    "residual": {"latent": LatentKind.residual, "pure_noise_share": 0.8, "diffusion_loss": VELOCITY, **TASK},
    "residual alone": {"latent": LatentKind.residual},
    "own labels": {"pseudo_labels": PseudoLabelSource.denoiser, "flip_teacher": True, **TASK},
    "own labels, mask": {"pseudo_labels": PseudoLabelSource.denoiser, "latent": LatentKind.mask},
    "own labels, residual, rich": {
        "pseudo_labels": PseudoLabelSource.denoiser,
        "latent": LatentKind.residual,
        "condition": ConditionKind.rich,
    },
    "map": {"adversary_input": AdversaryInput.map},
    "map, task, rich": {"adversary_input": AdversaryInput.map, "condition": ConditionKind.rich, **TASK},
    "twin": {"deterministic": True, "diffusion_loss": VELOCITY, **TASK},
    "twin, mask": {"deterministic": True, "latent": LatentKind.mask, **TASK},
}


def prepared(stage: AdversarialStage, numbers: range = range(4)) -> StageInputs:
    with torch.no_grad():
        return stage.prepare(random_batch(num_classes=19, numbers=numbers), 0)


def given_of(inputs: StageInputs) -> Noised:
    return Noised(*(inputs.tensors[name] for name in Noised._fields))


def frozen_of(stage: AdversarialStage) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": value
        for i, part in enumerate(stage.called_by_prepare())
        for name, value in part.state_dict().items()
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_changes_the_denoiser_and_leaves_e_and_d_to_the_bit(name: str):
    stage = make_stage(**SETTINGS[name])
    before = copy.deepcopy(frozen_of(stage)), copy.deepcopy(stage.module.denoiser.state_dict())
    optimizer = torch.optim.AdamW(stage.param_groups())
    for step in range(2):
        losses = stage.module(prepared(stage, range(4 * step, 4 * step + 4))).losses
        assert all(bool(torch.isfinite(loss)) for loss in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, before[0][key]) for key, value in frozen_of(stage).items())
    assert not all(torch.equal(v, before[1][key]) for key, v in stage.module.denoiser.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for part in stage.called_by_prepare() for p in part.parameters())
    trained = {id(p) for group in stage.param_groups() for p in group["params"]}
    assert trained == {id(p) for p in stage.module.parameters()}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_terms_of_the_denoiser_reach_all_of_it_and_nothing_else(name: str):
    stage = make_stage(**SETTINGS[name])
    with torch.no_grad():  # where it starts at 0, its first gradient is of its last layer alone
        stage.module.denoiser.head[-1].weight.normal_(std=0.1)
    for term in ("diffusion", "task_source", "task_mixed"):
        losses = stage.module(prepared(stage)).losses
        if term not in losses:
            continue
        losses[term].backward()
        assert not without_gradient(stage.module.denoiser), term
        still = [n for n, p in stage.module.denoiser.named_parameters() if not bool(p.grad.any()) and "bias" not in n]
        assert not still, (term, still)
        assert all(p.grad is None for p in stage.module.discriminator.parameters())
        stage.module.zero_grad()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_losses_of_a_batch_are_the_sum_of_its_parts(name: str):
    stage = make_stage(**SETTINGS[name])
    whole = prepared(stage)
    parts = [prepared(stage, range(i, i + 1)) for i in range(4)]
    for key, value in whole.denominators.items():
        torch.testing.assert_close(torch.stack([part.denominators[key] for part in parts]).sum(), value)
    expected = stage.module(whole).losses
    split = [stage.module(part._replace(denominators=whole.denominators)).losses for part in parts]
    for key, value in expected.items():
        total = torch.stack([losses[key] for losses in split]).sum()
        torch.testing.assert_close(total, value, rtol=1e-4, atol=1e-6)


def test_the_velocity_loss_is_the_noises_over_alpha_bar():
    losses = {}
    for kind in DiffusionLoss:
        stage = make_stage(diffusion_loss=kind, domain_weights=[1.0, 0.0, 0.0])
        inputs = prepared(stage, range(1))
        losses[kind] = stage.module(inputs).losses["diffusion"]
    alpha_bar = stage.model.alpha_bar[inputs.tensors["t"][0]]
    torch.testing.assert_close(losses[VELOCITY] * alpha_bar, losses[DiffusionLoss.noise], rtol=1e-4, atol=1e-6)


def test_a_share_of_the_samples_is_pure_noise_at_the_last_timestep():
    draws = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    timesteps = draw_timesteps(draws, draws.flip(0), pure_noise_share=0.3, num_train_steps=1000)
    assert float((timesteps == 1000).float().mean()) == pytest.approx(0.3, abs=0.03)
    uniform = draw_timesteps(draws, draws, pure_noise_share=0.0, num_train_steps=1000)
    assert torch.equal(uniform, (draws * 1000).long()) and int(uniform.max()) <= LAST
    stage = make_stage(pure_noise_share=0.5)
    alpha_bar, inputs = stage.model.alpha_bar, prepared(stage)
    given, z_0 = given_of(inputs), inputs.tensors["z_0"]
    assert 0 < int(given.is_pure.sum()) < len(z_0)
    for i, is_pure in enumerate(given.is_pure):
        alone = add_noise(z_0[i : i + 1], given.noise[i : i + 1], given.t[i : i + 1], alpha_bar)[0]
        assert torch.equal(given.z_t[i], given.noise[i] if is_pure else alone)
        assert not is_pure or given.t[i] == LAST


def test_other_draws_stay_as_they_are_where_a_share_is_pure_noise():
    plain, shared = (given_of(prepared(make_stage(pure_noise_share=share))) for share in (0.0, 0.5))
    kept = ~shared.is_pure
    assert torch.equal(plain.noise, shared.noise) and torch.equal(plain.z_t[kept], shared.z_t[kept])
    assert torch.equal(plain.t[kept], shared.t[kept]) and not bool(plain.is_pure.any())


@pytest.mark.parametrize("kind", DiffusionLoss)
def test_pure_noise_teaches_z_0_and_not_that_it_is_nothing(kind: DiffusionLoss):
    """The trap: of pure noise, the noise's error is least where z_0 = 0."""
    stage = make_stage()
    z_0, noise = torch.randn(2, 4, 4, 8), torch.randn(2, 4, 4, 8)
    given = noised(z_0, noise, torch.tensor([1000, 1000]), stage.model.alpha_bar)
    prediction = stage.module.denoiser(given.z_t, given.t, torch.randn(2, 4, 4, 8))
    errors = denoising_errors(prediction, z_0, given, stage.model.alpha_bar, loss=kind)
    torch.testing.assert_close(errors, latent_mse(prediction.z_0_pred, z_0))
    perfect = prediction._replace(z_0_pred=z_0)
    assert not denoising_errors(perfect, z_0, given, stage.model.alpha_bar, loss=kind).any()


def test_the_task_loss_is_of_the_decoded_clean_latent():
    stage = make_stage(**TASK)
    with torch.no_grad():  # statistics that are not 0 and 1
        stage.model.latent_mean.uniform_(-1, 1)
        stage.model.latent_std.uniform_(0.5, 2)
    inputs = prepared(stage)
    tensors = inputs.tensors
    z_0 = stage.module.denoiser(tensors["z_t"], tensors["t"], tensors["condition"]).z_0_pred
    latent = z_0 * stage.model.latent_std.view(1, -1, 1, 1) + stage.model.latent_mean.view(1, -1, 1, 1)
    logits = stage.model.decoder(latent, [tensors[f"seen_features_{i}"] for i in range(4)]).chunk(3)
    losses = stage.module(inputs).losses
    for name, of_domain in (("source", logits[0]), ("mixed", logits[2])):
        labels, weights = tensors[f"{name}_labels"], tensors[f"{name}_weights"]
        expected = weighted_cross_entropy(of_domain, labels, weights=weights, denominator=torch.tensor(4 * 32 * 64.0))
        torch.testing.assert_close(losses[f"task_{name}"], expected)
    assert bool((tensors["source_weights"] == 1).all())
    assert 0 < float(tensors["mixed_weights"].min()) < 1 == float(tensors["mixed_weights"].max())


def test_the_features_are_those_of_the_view_that_the_denoiser_sees():
    stage, outputs = make_stage(**TASK), []
    hook = stage.model.encoder.register_forward_hook(lambda _, __, output: outputs.append(output))
    tensors = prepared(stage).tensors
    hook.remove()
    clean, seen = outputs
    assert torch.equal(tensors["seen_features_1"], seen.features[1]) and not torch.equal(
        clean.features[1], seen.features[1]
    )


def test_a_label_in_z_t_is_no_answer():
    """Only pure noise counts if z_t is made of labels; ignored pixels count nowhere."""
    stage = make_stage(latent=LatentKind.mask, pure_noise_share=0.5, **TASK)
    batch = random_batch(num_classes=19, numbers=range(4))
    batch["source"]["labels"][:, :8] = IGNORE_INDEX
    with torch.no_grad():
        inputs = stage.prepare(batch, 0)
    is_pure = inputs.tensors["is_pure"].chunk(3)[0]
    assert 0 < int(is_pure.sum()) < 4
    assert torch.equal(inputs.tensors["source_weights"].amax(dim=(1, 2)), is_pure.float())
    assert float(inputs.denominators["task_source"]) == float(is_pure.sum()) * 24 * 64
    with pytest.raises(
        ValueError, match=r"task_weight=1.0 with model.latent=mask .*set stage2.objective.pure_noise_sh"
    ):
        make_stage(latent=LatentKind.mask, **TASK)


@pytest.mark.parametrize("adversary_input", list(AdversaryInput))
def test_the_twin_sees_no_noise_and_no_timestep(adversary_input: AdversaryInput):
    stage = make_stage(deterministic=True, adversary_input=adversary_input)
    inputs = prepared(stage)
    given = given_of(inputs)
    assert not given.z_t.any() and not given.noise.any() and bool(given.is_pure.all()) and bool((given.t == LAST).all())
    noisy = prepared(make_stage(adversary_input=adversary_input))
    for name in ("z_0", "condition", "domains", "diffusion_weights"):
        assert torch.equal(inputs.tensors[name], noisy.tensors[name]), "it is the control of all else being equal"
    losses = stage.module(inputs).losses
    prediction = stage.module.denoiser(given.z_t, given.t, inputs.tensors["condition"])
    torch.testing.assert_close(losses["diffusion"], latent_mse(prediction.z_0_pred, inputs.tensors["z_0"]).mean())


def test_the_twins_model_is_asked_once_and_without_noise():
    stage = make_stage(deterministic=True)
    images, asked = torch.rand(2, 3, 32, 64), []
    noises = [torch.randn(2, 4, 4, 8) for _ in range(2)]
    for model in stage.assemble_models().values():
        model.denoiser.register_forward_hook(lambda _, inputs, output: asked.append((inputs, output)))
        with torch.no_grad():
            first, second = (
                model.denoise_segment(images, noise=n, num_steps=k) for n, k in zip(noises, (1, 50), strict=True)
            )
        assert torch.equal(first, second)
    assert len(asked) == 4 and all(not z_t.any() and bool((t == LAST).all()) for (z_t, t, _), _ in asked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pure_noise_share": 1.5}, r"stage2.objective.pure_noise_share=1.5 must be between 0 and 1"),
        ({"task_weight": -1.0}, r"task_weight=-1.0 must be 0 \(off\) or above"),
        ({"confidence_threshold": 2.0}, r"confidence_threshold=2.0 must be between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        AdversarialConfig(**settings)
