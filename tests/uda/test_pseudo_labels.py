"""Pseudo-labels, class-wise thresholds, the balance of classes and the flip average, against slow references."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iccld.uda.pseudo_labels import MAX_BALANCE, PseudoLabels, class_probabilities, pseudo_labels

OPTIONS: list[dict[str, Any]] = [
    {},
    {"class_thresholds": 0.95},
    {"class_balance": 0.5},
    {"class_thresholds": 0.9, "class_balance": 0.5},
]


def label(probabilities: Tensor, **options: Any) -> PseudoLabels:
    valid = torch.ones(probabilities.shape[0], *probabilities.shape[2:], dtype=torch.bool)
    defaults = {"threshold": 0.968, "class_thresholds": 0.0, "class_balance": 0.0, "valid": valid}
    return pseudo_labels(probabilities, **{**defaults, **options})


def random_probabilities(count: int = 3, *, num_classes: int = 6, seed: int = 0) -> Tensor:
    """Classes of very different shares and confidences; the last one is absent from image 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, num_classes, 12, 16, generator=generator)
    logits += torch.linspace(2.0, -2.0, num_classes).view(1, -1, 1, 1)
    logits[0, -1] = -20.0
    return logits.softmax(dim=1)


def test_pseudo_labels_weigh_each_image_by_its_confident_share_and_margins_by_zero():
    logits = torch.zeros(2, 3, 4, 4)
    logits[0, 1] = 20.0  # every pixel of image 0 is sure
    logits[1, 2, 0] = 20.0  # one row of four of image 1 is
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[:, 3] = False
    labels, weights, confident = label(logits.softmax(dim=1), valid=valid)
    assert (labels[0] == 1).all() and (labels[1, 0] == 2).all()
    assert confident.tolist() == [1.0, 0.25]
    assert (weights[0, :3] == 1.0).all() and (weights[1, :3] == 0.25).all() and (weights[:, 3] == 0).all()


@pytest.mark.parametrize("share", [0.5, 0.95, 1.0])
def test_a_pixel_must_reach_the_share_of_its_classs_mean_confidence_over_the_largest(share: float):
    probabilities = random_probabilities()
    valid = torch.ones(3, 12, 1, dtype=torch.bool)
    valid[:, 9:] = False
    result = label(probabilities, class_thresholds=share, valid=valid)
    for i, image in enumerate(probabilities):
        confidence, classes = image.max(dim=0)
        within = valid[i].expand(12, 16)
        means = {int(c): float(confidence[within & (classes == c)].mean()) for c in classes[within].unique()}
        assert len(means) == (5 if i == 0 else 6)
        largest = max(means.values())
        for y in range(12):
            for x in range(16):
                reached = y < 9 and float(confidence[y, x]) >= share * means[int(classes[y, x])] / largest
                assert result.weights[i, y, x] == float(reached)
        torch.testing.assert_close(result.confident[i], result.weights[i].mean())


def test_a_class_that_is_never_sure_keeps_pixels_by_class_wise_thresholds_and_none_by_a_common_one():
    probabilities = torch.zeros(1, 3, 4, 8)
    probabilities[:, 0, :, :4], probabilities[:, 1, :, :4] = 0.99, 0.01
    probabilities[:, 2, :, 4:], probabilities[:, 1, :, 4:] = 0.6, 0.4
    weights = label(probabilities, class_thresholds=0.95).weights
    assert (weights == 1).all()
    common = label(probabilities, class_thresholds=0.0)
    assert (common.labels[..., 4:] == 2).all() and common.confident.tolist() == [0.5]


@pytest.mark.parametrize("class_thresholds", [0.0, 0.95])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_balance_weighs_by_the_power_of_a_classs_share_and_keeps_the_mean(exponent: float, class_thresholds: float):
    probabilities = random_probabilities()
    plain = label(probabilities, class_thresholds=class_thresholds, threshold=0.5)
    balanced = label(probabilities, class_thresholds=class_thresholds, threshold=0.5, class_balance=exponent)
    torch.testing.assert_close(balanced.weights.mean(dim=(1, 2)), plain.weights.mean(dim=(1, 2)))
    assert torch.equal(balanced.confident, plain.confident) and torch.equal(balanced.labels, plain.labels)
    for i in range(3):
        classes, weights = plain.labels[i].long(), plain.weights[i]
        shares = torch.bincount(classes.flatten(), weights.flatten(), minlength=6) / weights.sum()
        raw = torch.where(shares > 0, shares, 1.0) ** -exponent
        raw = (raw / (raw * shares).sum()).clamp(1 / MAX_BALANCE, MAX_BALANCE)
        expected = weights * (raw / (raw * shares).sum())[classes]
        torch.testing.assert_close(balanced.weights[i], expected, rtol=1e-5, atol=1e-7)


def test_three_pixels_of_a_class_do_not_dominate():
    probabilities = torch.zeros(1, 2, 100, 100)
    probabilities[:, 0] = 1.0
    probabilities[:, :, 0, :3] = torch.tensor([0.0, 1.0]).view(1, 2, 1)
    weights = label(probabilities, class_balance=1.0).weights
    assert weights[0, 1:].unique().numel() == 1
    assert float(weights[0, 0, 0] / weights[0, 1, 0]) <= MAX_BALANCE**2
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))


@pytest.mark.parametrize("options", OPTIONS)
def test_an_image_does_not_depend_on_its_batch(options: dict[str, Any]):
    probabilities = random_probabilities()
    together = label(probabilities, threshold=0.5, **options)
    alone = [label(probabilities[i : i + 1], threshold=0.5, **options) for i in range(3)]
    for name in PseudoLabels._fields:
        assert torch.equal(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))


@pytest.mark.parametrize("options", OPTIONS)
def test_where_nothing_is_to_be_trusted_every_weight_is_zero_and_finite(options: dict[str, Any]):
    valid = torch.zeros(3, 12, 1, dtype=torch.bool)
    assert (label(random_probabilities(), valid=valid, **options).weights == 0).all()


def test_the_flip_average_is_the_mean_of_both_views_probabilities_and_turns_with_the_image():
    torch.manual_seed(0)
    network = nn.Conv2d(3, 4, 3, padding=1)
    images = torch.rand(2, 3, 6, 8)
    plain = class_probabilities(network, images, flip=False)
    torch.testing.assert_close(plain, network(images).softmax(dim=1))
    mean = class_probabilities(network, images, flip=True)
    mirrored = network(images.flip(3)).softmax(dim=1).flip(3)
    torch.testing.assert_close(mean, (plain + mirrored) / 2)
    assert not torch.allclose(mean, plain, atol=1e-3)
    torch.testing.assert_close(class_probabilities(network, images.flip(3), flip=True), mean.flip(3))
