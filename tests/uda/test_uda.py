"""ClassMix, masks, strong augmentation and the teacher, against slow references and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from iccld.labels import IGNORE_INDEX
from iccld.uda.classmix import class_mask, paste
from iccld.uda.masking import block_mask
from iccld.uda.photometric import NUM_DRAWS, strong_augment
from iccld.uda.settings import PhotometricConfig
from iccld.uda.teacher import Teacher, ema_decay


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 19))
def test_class_mask_takes_half_of_the_classes_of_each_image_alone(seed: int, batch: int, num_classes: int):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (batch, 5, 6), generator=generator).to(torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE_INDEX
    scores = torch.rand(batch, num_classes, generator=generator)
    mask = class_mask(labels, scores)
    for i in range(batch):
        present = set(labels[i].unique().tolist()) - {IGNORE_INDEX}
        taken = set(labels[i][mask[i]].unique().tolist())
        assert len(taken) == math.ceil(len(present) / 2)
        assert taken == set(sorted(present, key=lambda c: -scores[i, c])[: len(taken)])
        assert all(bool(mask[i][labels[i] == c].all()) for c in taken)
        assert torch.equal(class_mask(labels[i : i + 1], scores[i : i + 1]), mask[i : i + 1])


def test_class_mask_of_an_ignored_image_is_empty():
    assert not class_mask(torch.full((1, 4, 4), IGNORE_INDEX), torch.rand(1, 19)).any()


def test_paste_keeps_source_pixels_under_the_mask_and_target_pixels_elsewhere():
    mask = torch.rand(2, 4, 5) < 0.5
    source, target = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    mixed = paste(mask, source, target)
    where = mask.unsqueeze(1).expand_as(mixed)
    assert torch.equal(mixed[where], source[where])
    assert torch.equal(mixed[~where], target[~where])
    assert torch.equal(paste(mask, source[:, 0], target[:, 0]), mixed[:, 0])


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 5), st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_block_mask_hides_whole_blocks(height: int, width: int, rows: int, columns: int):
    draws = torch.rand(1, rows, columns)
    mask = block_mask(draws, height=height, width=width, ratio=0.7)
    assert mask.shape == (1, 1, height, width)
    for y in range(height):
        for x in range(width):
            assert mask[0, 0, y, x] == float(draws[0, y * rows // height, x * columns // width] >= 0.7)


def test_strong_augment_of_a_sample_does_not_depend_on_its_batch():
    images, draws = torch.rand(4, 3, 16, 24), torch.rand(4, NUM_DRAWS, dtype=torch.float64)
    together = strong_augment(images, draws, PhotometricConfig())
    alone = torch.cat([strong_augment(images[i : i + 1], draws[i : i + 1], PhotometricConfig()) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert together.min() >= 0 and together.max() <= 1 and not torch.equal(together, images)


def test_strong_augment_is_fp32_under_autocast():
    images, draws = torch.rand(2, 3, 16, 16), torch.rand(2, NUM_DRAWS)
    config = PhotometricConfig(blur_probability=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        under = strong_augment(images, draws, config)
    assert torch.equal(under, strong_augment(images, draws, config))
    assert strong_augment(images.to("meta"), draws, config).shape == images.shape


@pytest.mark.parametrize("sigma", [1.15, 1.65, 3.0, 6.0])
def test_the_strongest_blur_has_the_standard_deviation_that_is_asked_for(sigma: float):
    config = PhotometricConfig(jitter_probability=0.0, blur_probability=1.0, blur_sigma_max=sigma)
    point = torch.zeros(1, 3, 81, 81)
    point[..., 40, 40] = 1.0
    draws = torch.zeros(1, NUM_DRAWS)
    draws[:, 6] = 1.0
    profile = strong_augment(point, draws, config)[0, 0].sum(dim=0)
    places = torch.arange(81) - 40
    assert float((profile * places**2).sum() / profile.sum()) ** 0.5 == pytest.approx(sigma, rel=0.02)


def test_strong_augment_with_probability_zero_changes_nothing():
    images = torch.rand(2, 3, 16, 16)
    config = PhotometricConfig(jitter_probability=0.0, blur_probability=0.0)
    assert torch.equal(strong_augment(images, torch.rand(2, NUM_DRAWS), config), images)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"jitter": 1.5}, r"photometric.jitter=1.5 must be between 0 and 1"),
        ({"blur_sigma_min": 0.0}, "blur_sigma_min=0.0"),
    ],
)
def test_photometric_settings_out_of_range_are_refused(settings_: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        PhotometricConfig(**settings_)


def test_the_teacher_is_the_student_after_the_first_step_and_the_moving_average_afterwards():
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = Teacher(student, max_decay=0.5)
    expected = [p.detach().clone() for p in student.parameters()]
    for step in range(5):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
            student[1].running_mean.add_(1.0)
        teacher.update(student, step)
        decay = ema_decay(step, max_decay=0.5)
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected, student.parameters(), strict=True)]
    assert (
        ema_decay(0, max_decay=0.5) == 0.0 and ema_decay(1, max_decay=0.5) == 0.5 and ema_decay(9, max_decay=0.5) == 0.5
    )
    for average, value in zip(teacher.module.parameters(), expected, strict=True):
        torch.testing.assert_close(average, value.detach())
        assert not average.requires_grad
    assert teacher.module[1].running_mean.tolist() == [5.0] * 4
    assert not teacher.module.training


def test_the_teacher_of_a_bf16_student_is_fp32_and_does_not_stall():
    student = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(student.weight, 0.1)
    teacher = Teacher(student, max_decay=0.999)
    nn.init.constant_(student.weight, 0.11)
    for step in range(5000, 10_000):
        teacher.update(student, step)
    assert teacher.module.weight.dtype == torch.float32
    assert teacher.module.weight.item() == pytest.approx(student.weight.item(), rel=0.002)
