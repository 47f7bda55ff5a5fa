"""Objectives against slow loops, and the property that splitting a batch changes nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.losses import (
    domain_confusion,
    domain_cross_entropy,
    feature_distance,
    latent_mse,
    weighted_cross_entropy,
)


def random_case(seed: int, *, batch: int = 3, classes: int = 4, size: tuple[int, int] = (6, 8)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, *size, generator=generator)
    labels = torch.randint(0, classes + 1, (batch, *size), generator=generator, dtype=torch.uint8)
    labels[labels == classes] = 255
    return logits, labels, torch.rand(batch, *size, generator=generator)


def loop_cross_entropy(logits, labels, weights) -> float:
    total = 0.0
    for b in range(len(labels)):
        for i in range(labels.shape[1]):
            for j in range(labels.shape[2]):
                label = int(labels[b, i, j])
                if label != 255:
                    scores = [math.exp(float(x)) for x in logits[b, :, i, j]]
                    total -= float(weights[b, i, j]) * math.log(scores[label] / sum(scores))
    return total


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10_000))
def test_cross_entropy_equals_the_loop(seed: int):
    logits, labels, weights = random_case(seed)
    valid = (labels != 255).sum()
    loss = weighted_cross_entropy(logits, labels, weights=weights, denominator=valid)
    expected = loop_cross_entropy(logits, labels, weights) / int(valid)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    unweighted = weighted_cross_entropy(logits, labels, weights=None, denominator=valid)
    assert float(unweighted) == pytest.approx(float(F.cross_entropy(logits, labels.long(), ignore_index=255)), rel=1e-4)


def test_cross_entropy_upsamples_the_logits_bilinearly():
    logits, labels, weights = random_case(0, size=(16, 24))
    small = F.avg_pool2d(logits, 4)
    large = F.interpolate(small, size=(16, 24), mode="bilinear", align_corners=False)
    loss = weighted_cross_entropy(small, labels, weights=weights, denominator=torch.tensor(7.0))
    assert float(loss) == pytest.approx(loop_cross_entropy(large, labels, weights) / 7.0, rel=1e-4)


def test_cross_entropy_adds_up_over_a_split_batch():
    logits, labels, weights = random_case(1)
    valid = (labels != 255).sum()
    whole = weighted_cross_entropy(logits, labels, weights=weights, denominator=valid)
    parts = [
        weighted_cross_entropy(logits[s], labels[s], weights=weights[s], denominator=valid)
        for s in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_cross_entropy_of_fewer_valid_pixels_than_micro_batches_adds_up():
    logits, labels, _ = random_case(1, batch=4)
    few = torch.full_like(labels, 255)
    few[0, 1, 2], few[3, 4, 5] = 1, 2
    valid = (few != 255).sum().float()
    whole = weighted_cross_entropy(logits, few, weights=None, denominator=valid)
    parts = [
        weighted_cross_entropy(logits[i : i + 1], few[i : i + 1], weights=None, denominator=valid / 4) for i in range(4)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_cross_entropy_without_a_valid_pixel_is_zero_with_zero_gradient():
    logits, labels, _ = random_case(2)
    logits.requires_grad_()
    loss = weighted_cross_entropy(logits, torch.full_like(labels, 255), weights=None, denominator=torch.tensor(0.0))
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and bool((logits.grad == 0).all())


def test_cross_entropy_is_taken_in_float32():
    logits, labels, _ = random_case(3)
    loss = weighted_cross_entropy(logits.bfloat16(), labels, weights=None, denominator=torch.tensor(9.0))
    assert loss.dtype == torch.float32


def test_domain_losses_equal_loops_per_sample():
    logits, domains = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 2])
    right, confused = domain_cross_entropy(logits, domains), domain_confusion(logits)
    for b in range(4):
        log_p = [logits[b, :, i, j].log_softmax(0) for i in range(2) for j in range(5)]
        assert float(right[b]) == pytest.approx(-sum(float(p[domains[b]]) for p in log_p) / 10, rel=1e-5)
        assert float(confused[b]) == pytest.approx(-sum(float(p.mean()) for p in log_p) / 10, rel=1e-5)


def test_confusion_is_least_where_domains_cannot_be_told_apart():
    flat, sure = torch.zeros(1, 3, 2, 2), torch.tensor([4.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert float(domain_confusion(flat)) == pytest.approx(math.log(3))
    assert float(domain_confusion(sure)) > math.log(3)


def test_latent_mse_equals_the_loop():
    generator = torch.Generator().manual_seed(1)
    prediction, latent = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(2))
    expected = []
    for one, other in zip(prediction, latent, strict=True):
        squares = [(float(p) - float(n)) ** 2 for p, n in zip(one.flatten(), other.flatten(), strict=True)]
        expected.append(sum(squares) / len(squares))
    assert latent_mse(prediction, latent).tolist() == pytest.approx(expected, rel=1e-5)


def loop_feature_distance(features, reference, labels, classes, min_share) -> float:
    batch, _, rows, columns = features.shape
    block_h, block_w = labels.shape[1] // rows, labels.shape[2] // columns
    samples = []
    for b in range(batch):
        distances = []
        for i in range(rows):
            for j in range(columns):
                block = labels[b, i * block_h : (i + 1) * block_h, j * block_w : (j + 1) * block_w]
                if any(float((block == c).float().mean()) >= min_share for c in classes):
                    distances.append(float((features[b, :, i, j] - reference[b, :, i, j]).norm()))
        samples.append(sum(distances) / len(distances) if distances else 0.0)
    return sum(samples) / batch


def test_feature_distance_equals_the_loop_and_its_share_is_of_one_class():
    generator = torch.Generator().manual_seed(2)
    features, reference = (torch.randn(2, 5, 2, 3, generator=generator) for _ in range(2))
    labels = torch.zeros(2, 8, 12, dtype=torch.uint8)
    labels[0, :4, :4] = 1  # wholly one thing
    labels[0, :4, 4:7] = 2  # exactly 75 % of its position
    labels[0, 4:, 0:2], labels[0, 4:, 2:4] = 1, 2  # two things, neither has enough
    labels[0, 4:, 4:] = 255
    distance = feature_distance(features, reference, labels, classes=[1, 2], stride=4)
    assert float(distance) == pytest.approx(loop_feature_distance(features, reference, labels, [1, 2], 0.75), rel=1e-5)
    by_hand = sum(float((features - reference)[0, :, 0, j].norm()) for j in (0, 1)) / 2
    assert float(distance) == pytest.approx(by_hand / 2, rel=1e-5)  # the second sample has no position: 0


@pytest.mark.parametrize("height", [96, 104, 136, 200, 360])
def test_a_class_that_fills_a_row_of_features_counts_there_though_the_last_row_is_in_part_beyond_the_image(height: int):
    num_rows = -(-height // 32)
    for row in range(num_rows):
        labels = torch.zeros(1, height, 64, dtype=torch.uint8)
        labels[:, 32 * row : 32 * (row + 1)] = 1
        features = torch.zeros(1, 4, num_rows, 2)
        features[:, 0, row] = 3.0
        assert feature_distance(features, torch.zeros_like(features), labels, classes=[1]).item() == 3.0


def test_feature_distance_of_no_position_and_of_equal_features_has_finite_gradients():
    features = torch.randn(1, 4, 2, 2, requires_grad=True)
    labels = torch.ones(1, 8, 8, dtype=torch.uint8)
    for classes in ([], [1]):
        distance = feature_distance(features, features.detach().clone(), labels, classes=classes, stride=4)
        distance.backward()
        assert distance.item() == 0.0 and features.grad is not None and bool((features.grad == 0).all())
