"""Figures on cases whose answer is known: a decoder that reads z, a denoiser that knows z_0, another image's latent."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iccld.diagnostics import (
    BOUNDS,
    FIT_RATE,
    FIT_STEPS,
    YARDSTICK,
    Diagnosis,
    Example,
    Figure,
    blurred,
    diagnose,
    figure_names,
    fitted_latent,
    label_maps,
    make_example,
)
from iccld.labels import IGNORE_INDEX, merged_class_set
from iccld.models.encoder import EncoderOutput
from iccld.models.latent import denormalise, normalise
from iccld.models.settings import LatentKind
from iccld.settings import EvaluationConfig
from tests.models.factory import trained_model

CLASS_SET = merged_class_set(["road", "person", "car"], {0: 0, 1: 0, 11: 1, 13: 2})
K = CLASS_SET.num_classes
TIMES = [999, 749, 499, 249]


class Reader:
    """A model that is known: the latent is the class of an 8 x 8 block, one channel a class, and D reads it out."""

    denoiser: Any = None
    mask_encoder = None
    deterministic = False
    num_classes = K
    config = SimpleNamespace(latent=LatentKind.image)

    def __init__(self, *, error: int = 0, denoised: float = 1.0) -> None:
        """`error`: E takes each class for one so many further on; the denoiser multiplies z_0 by `denoised`."""
        self.alpha_bar = torch.linspace(0.999, 0.001, 1000)
        self.latent_mean = self.condition_mean = torch.tensor([0.5, 0.2, 0.1])
        self.latent_std = self.condition_std = torch.tensor([2.0, 1.0, 0.5])
        self.error, self.denoised = error, denoised

    def encoder(self, images: Tensor) -> EncoderOutput:
        classes = (images[:, 0, 4::8, 4::8] * 255).round().long()
        one_hot = torch.nn.functional.one_hot((classes + self.error) % K, K).permute(0, 3, 1, 2).float()
        return EncoderOutput(one_hot, ())

    def decode(self, encoded: EncoderOutput, size: Any) -> Tensor:
        return torch.nn.functional.interpolate(encoded.latent, size=tuple(size), mode="nearest")

    def segment(self, images: Tensor) -> Tensor:
        return self.decode(self.encoder(images), images.shape[-2:])

    def decodable(self, z_0: Tensor, encoded_latent: Tensor) -> Tensor:
        return denormalise(z_0, mean=self.latent_mean, std=self.latent_std)

    def diffused_latent(self, *, clean: Tensor, **_: Any) -> Tensor:
        return normalise(clean, mean=self.latent_mean, std=self.latent_std)

    def condition_of(self, encoded: EncoderOutput, images: Tensor) -> Tensor:
        return normalise(encoded.latent, mean=self.condition_mean, std=self.condition_std)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return K, height // 8, width // 8


class Denoised(Reader):
    """Model with a denoiser that knows z_0 = E(x), given as the condition, or a multiple of it."""

    def denoiser(self, z_t: Tensor, t: Tensor, condition: Tensor) -> Any:
        return SimpleNamespace(z_0_pred=self.denoised * condition)

    def denoise_segment(self, images: Tensor, *, noise: Tensor, num_steps: int) -> Tensor:
        assert noise.shape == (1, *self.latent_shape(*images.shape[-2:])) and num_steps == 1
        return self.segment(images)


def sample(number: int, *, height: int = 32, width: int = 48) -> dict[str, Any]:
    """Blocks of 8 x 8 pixels, whose red value is their class; every class is there."""
    generator = np.random.default_rng(number)
    blocks = generator.integers(0, K, (height // 8, width // 8)).astype(np.uint8)
    blocks.flat[:K] = range(K)
    labels = np.kron(blocks, np.ones((8, 8), np.uint8))
    return {"image": np.stack([labels] * 3, -1), "labels": labels, "key": str(number), "number": number}


def found(model: Any, pairs: Any, **options: Any) -> dict[str, Figure]:
    settings = {"class_set": CLASS_SET, "config": EvaluationConfig(), "seed": 0} | options
    return dict(diagnose(pairs, model, **settings).figures)


def test_a_decoder_that_reads_z_scores_100_with_its_own_latent_and_what_the_other_image_has_with_the_others():
    pairs = [(sample(0), sample(1)), (sample(1), sample(0))]
    figures = found(Reader(), pairs)
    assert list(figures) == ["stage1", "own_latent", *BOUNDS, YARDSTICK]
    for name in ("stage1", "own_latent", "fitted_latent"):
        assert figures[name] == Figure(100.0, 100.0, 0.0), name
    one, other = pairs[0][0]["labels"], pairs[0][1]["labels"]
    assert figures["other_latent"].changed == pytest.approx(100 * (one != other).mean())
    ious = [100 * ((one == c) & (other == c)).sum() / ((one == c) | (other == c)).sum() for c in range(K)]
    assert figures["other_latent"].miou == pytest.approx(np.mean(ious))
    # The mean latent's largest channel is class 0 everywhere.
    share = (np.stack([one, other]) == 0).mean()
    assert figures["mean_latent"].miou == pytest.approx(100 * share / 3)
    assert figures["mean_latent"].changed == pytest.approx(100 * (1 - share))


def test_an_encoder_that_is_wrong_everywhere_is_mended_by_gradient_steps_on_the_true_labels():
    figures = found(Reader(error=1), [(sample(0), None)])
    assert figures["stage1"].miou == 0.0
    assert figures["fitted_latent"].miou == 100.0 and figures["fitted_latent"].changed == 100.0
    assert "other_latent" not in figures, "there is no other image"


@pytest.mark.parametrize(("factor", "miou"), [(1.0, 100.0), (0.5, 100.0), (-1.0, 0.0)])
def test_a_denoiser_that_knows_z_0_decodes_as_z_0_does_at_every_timestep(factor: float, miou: float):
    """A multiple of z_0 reads as z_0; its negative never does."""
    figures = found(Denoised(denoised=factor), [(sample(n), None) for n in range(2)], with_bounds=False)
    assert figures["denoised"] == Figure(100.0, 100.0, 0.0)
    assert [figures[f"z_0_at_{t}"].miou for t in TIMES] == [miou] * 4


def test_a_denoiser_that_takes_z_t_for_z_0_is_worse_the_more_noise_there_is():
    class Copying(Denoised):
        def denoiser(self, z_t: Tensor, t: Tensor, condition: Tensor) -> Any:
            return SimpleNamespace(z_0_pred=z_t)

    figures = found(Copying(), [(sample(n), None) for n in range(4)])
    mious = [figures[f"z_0_at_{t}"].miou for t in TIMES]
    assert mious == sorted(mious) and mious[0] < 45 and mious[-1] > 60


def test_the_students_disagreement_is_to_the_teachers_map():
    teacher, student = Reader(error=1), Reader(error=1)
    diagnosis = diagnose(
        [(sample(0), None)], teacher, student=student, class_set=CLASS_SET, config=EvaluationConfig(), seed=0
    )
    assert diagnosis.figures["student"].changed == 0.0
    right = Reader()
    diagnosis = diagnose(
        [(sample(0), None)], teacher, student=right, class_set=CLASS_SET, config=EvaluationConfig(), seed=0
    )
    assert diagnosis.figures["student"] == Figure(100.0, 100.0, 100.0)
    assert diagnosis.to_metrics()["diagnostics/disagreement"] == 1.0
    assert diagnosis.to_metrics()["diagnostics/student"] == 100.0


@pytest.mark.parametrize("latent", list(LatentKind))
def test_the_figures_of_ranks_add_up_to_those_of_one(latent: LatentKind):
    model, student = (trained_model(latent=latent, num_classes=K, seed=seed) for seed in (0, 1))
    pairs = [(sample(n, height=24 - 8 * (n % 2), width=32), sample(n + 1)) for n in range(3)]
    counts: list[Tensor] = []

    def keep(own: Tensor) -> Tensor:
        counts.append(own)
        return own

    options = {"class_set": CLASS_SET, "config": EvaluationConfig(), "seed": 0, "student": student}
    whole = diagnose(pairs, model, **options)
    for rank in range(2):
        diagnose(pairs[rank::2], model, **options, all_reduce=keep)
    summed = diagnose([], model, **options, all_reduce=lambda own: sum(counts, own))  # a rank without images
    assert summed == whole and whole.num_images == 3
    assert list(whole.figures) == figure_names(model)
    assert len({figure.miou for figure in whole.figures.values()}) > 4


def test_without_bounds_those_are_left_out_and_the_others_are_the_same():
    model = trained_model(num_classes=K)
    pairs = [(sample(0), sample(1))]
    whole, part = found(model, pairs), found(model, pairs, with_bounds=False)
    assert part == {name: figure for name, figure in whole.items() if name not in BOUNDS}


def test_a_denoiser_that_never_sees_noise_has_no_timesteps():
    model = trained_model(num_classes=K)
    model.deterministic = True
    names = found(model, [(sample(0), None)], with_bounds=False)
    assert list(names) == ["stage1", "own_latent", "denoised", YARDSTICK]


def test_where_z_0_is_a_move_of_es_latent_no_move_is_stage_1_and_the_true_move_lowers_the_loss():
    model = trained_model(latent=LatentKind.residual, num_classes=K)
    example = make_example(sample(0), config=EvaluationConfig(), device="cpu")
    maps = dict(label_maps(model, example, None, seed=0))
    assert torch.equal(maps["mean_latent"], maps["stage1"])
    assert not torch.equal(maps["own_latent"], maps["stage1"])
    right = [(maps[name] == example.labels).float().mean() for name in ("stage1", "own_latent", "fitted_latent")]
    assert right == sorted(right)


def test_the_noise_is_keyed_by_the_image_and_the_seed():
    model = trained_model(num_classes=K)
    one, other = sample(0), sample(0) | {"number": 7}
    first, again, of_other, of_seed = (
        found(model, [(image, None)], seed=seed, with_bounds=False)
        for image, seed in ((one, 0), (one, 0), (other, 0), (one, 1))
    )
    assert again == first and of_other != first and of_seed != first


def test_no_parameter_gets_a_gradient_or_changes():
    model = trained_model(num_classes=K)
    before = copy.deepcopy(model.state_dict())
    found(model, [(sample(0), sample(1))])
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_fit_moves_each_value_by_a_few_standard_deviations_at_most_and_lowers_the_loss():
    model = trained_model(num_classes=K)
    model.latent_std.copy_(torch.tensor([0.1, 1.0, 2.0, 5.0]))
    example = make_example(sample(0), config=EvaluationConfig(), device="cpu")
    with torch.no_grad():
        encoded = model.encoder(example.images)
        latent = fitted_latent(model, encoded, example.labels)
        losses = [
            torch.nn.functional.cross_entropy(
                model.decode(EncoderOutput(z, encoded.features), example.labels.shape[-2:]), example.labels.long()
            )
            for z in (encoded.latent, latent)
        ]
    moved = ((latent - encoded.latent) / model.latent_std.view(1, -1, 1, 1)).abs()
    assert 0.5 < moved.max() <= FIT_STEPS * FIT_RATE * 1.05
    assert losses[1] < losses[0] and not latent.requires_grad


def test_labels_that_are_ignored_move_nothing_and_count_nothing():
    model = Reader(error=1)
    ignored = sample(0)
    ignored["labels"] = np.full_like(ignored["labels"], IGNORE_INDEX)
    assert found(model, [(sample(0), None), (ignored, None)]) == found(model, [(sample(0), None)])


def test_an_example_is_of_the_size_that_the_model_sees():
    whole = sample(0, height=40, width=48)
    config = EvaluationConfig(sliding_window=True, window=[16, 32], stride=[16, 16])
    example = make_example(whole, config=config, device="cpu")
    assert torch.equal(example.labels[0], torch.from_numpy(whole["labels"][12:28, 8:40]))
    assert torch.equal((example.images[0, 0] * 255).round().to(torch.uint8), example.labels[0])
    odd = {name: value[:37, :45] if name in ("image", "labels") else value for name, value in whole.items()}
    example = make_example(odd, config=EvaluationConfig(), device="cpu")
    assert example.images.shape == (1, 3, 40, 48) and (example.labels[0, 37:] == IGNORE_INDEX).all()
    assert (example.labels[0, :, 45:] == IGNORE_INDEX).all() and (example.labels[0, :37, :45] < K).all()
    example = make_example(whole, config=EvaluationConfig(image_size=[80, 96]), device="cpu")
    assert torch.equal(example.labels[0], torch.from_numpy(np.kron(whole["labels"], np.ones((2, 2), np.uint8))))


def test_the_yardstick_of_blur_keeps_what_is_larger_than_its_cells_and_loses_what_is_smaller():
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[:, :, 32:] = 1
    labels[:, 24:30, 8:14] = 2  # within a cell, less than half of it
    labels[:, 60:] = IGNORE_INDEX
    expected = torch.where(labels == 2, 0, labels)
    seen = blurred(labels, stride=16, num_classes=K)
    assert torch.equal(seen[:, :60], expected[:, :60].long())


def test_json_has_null_for_what_is_not_a_number():
    diagnosis = Diagnosis({"stage1": Figure(50.0, float("nan"), 0.0)}, num_images=2)
    assert diagnosis.to_json() == {
        "num_images": 2,
        "stage1": {"miou": 50.0, "boundary_miou": None, "changed": 0.0},
    }
    assert diagnosis.to_metrics() == {"diagnostics/stage1": 50.0}


def test_an_image_of_another_size_gives_a_latent_of_this_ones():
    assert isinstance(make_example(sample(0), config=EvaluationConfig(), device="cpu"), Example)
    figures = found(Reader(), [(sample(0), sample(1, height=64, width=96))])
    assert 0 < figures["other_latent"].changed < 100


@pytest.mark.parametrize("height", [352, 360, 368])
def test_blurred_labels_of_whole_cells_are_the_labels(height: int):
    rows = torch.arange(height) // 16 % 2
    labels = rows.view(1, -1, 1).expand(1, height, 32).to(torch.uint8)
    far_from_edges = (torch.arange(height) % 16 >= 4) & (torch.arange(height) % 16 < 12)
    assert torch.equal(blurred(labels, stride=16, num_classes=2)[:, far_from_edges], labels[:, far_from_edges].long())
