"""Scores against slow loops and cases computed by hand."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.labels import CITYSCAPES_19, IGNORE_INDEX, merged_class_set
from iccld.scores import Scores, boundary_band

CLASS_SET = merged_class_set(["road", "person", "car"], {0: 0, 1: 0, 11: 1, 13: 2})
K = CLASS_SET.num_classes


def loop_confusion(prediction, labels, num_classes):
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for p, t in zip(prediction.flat, labels.flat, strict=True):
        if t != IGNORE_INDEX:
            confusion[t, p] += 1
    return confusion


def loop_band(labels, valid, width):
    band = np.zeros(labels.shape, bool)
    for y, x in np.argwhere(valid):
        here = np.s_[max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1]
        band[y, x] = (valid[here] & (labels[here] != labels[y, x])).any()
    return band


@st.composite
def label_pairs(draw, num_classes=K):
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Blocks of 3 x 3, so that some pixels are not on a boundary.
    blocks = [np.kron(generator.integers(0, num_classes, (3, 3)), np.ones((3, 3))) for _ in range(2)]
    prediction, labels = (block[: shape[0], : shape[1]].astype(np.uint8) for block in blocks)
    labels = np.where(generator.random(shape) < draw(st.sampled_from([0.0, 0.2, 1.0])), IGNORE_INDEX, labels)
    return prediction, labels.astype(np.uint8)


@given(label_pairs(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_counts_equal_slow_loops(pair, width):
    prediction, labels = pair
    scores = Scores(K, boundary_width=width)
    scores.add(torch.from_numpy(prediction), torch.from_numpy(labels))
    assert (scores.confusion.numpy() == loop_confusion(prediction, labels, K)).all()
    valid = labels != IGNORE_INDEX
    bands = loop_band(prediction, valid, width), loop_band(labels, valid, width)
    for c in range(K):
        p, t = bands[0] & (prediction == c), bands[1] & (labels == c)
        assert scores.boundary[:, c].tolist() == [(p & t).sum(), p.sum(), t.sum()]


@given(st.lists(label_pairs(), min_size=1, max_size=5), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_counts_of_a_split_add_up(pairs, cut):
    def counts(part):
        scores = Scores(K)
        for prediction, labels in part:
            scores.add(torch.from_numpy(prediction), torch.from_numpy(labels))
        return scores.counts

    assert torch.equal(counts(pairs[:cut]) + counts(pairs[cut:]), counts(pairs))


def test_boundary_band_of_a_square_in_the_middle_and_none_at_the_image_border_or_at_ignored_pixels():
    labels = torch.zeros(9, 9, dtype=torch.long)
    labels[3:6, 3:6] = 1
    band = boundary_band(labels, torch.ones(9, 9, dtype=torch.bool), width=1)
    inner, outer = torch.zeros(9, 9, dtype=torch.bool), torch.zeros(9, 9, dtype=torch.bool)
    outer[2:7, 2:7] = True
    inner[4, 4] = True
    assert torch.equal(band, outer & ~inner)
    assert not boundary_band(labels, labels == 0, width=1).any()


def test_scores_of_a_case_computed_by_hand():
    scores = Scores(K)
    scores.add(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 0, IGNORE_INDEX]]))
    result = scores.result(CLASS_SET)
    assert result.iou[:2] == pytest.approx([200 / 3, 0.0])  # person: predicted, not in the truth
    assert math.isnan(result.iou[2])  # car: nowhere, left out of the mean
    assert result.miou == pytest.approx(100 / 3)
    assert result.pixel_accuracy == pytest.approx(200 / 3)
    assert result.mean_accuracy == pytest.approx(200 / 3)  # over the classes in the truth
    assert result.num_images == 1


def test_a_perfect_prediction_scores_100():
    labels = torch.arange(K).repeat_interleave(4).repeat(6, 1)
    scores = Scores(K)
    scores.add(labels, labels)
    result = scores.result(CLASS_SET)
    assert result.iou == result.boundary_iou == [100.0] * K
    assert result.miou == result.boundary_miou == result.pixel_accuracy == result.mean_accuracy == 100.0


@pytest.mark.parametrize("num_classes", [19, 16, 13])
def test_subset_mean_is_the_mean_of_the_subsets_own_ious(num_classes):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 19, (40, 40), generator=generator)
    prediction = torch.where(torch.rand(40, 40, generator=generator) < 0.6, labels, labels.roll(1))
    scores = Scores(19)
    scores.add(prediction, labels)
    result = scores.result(CITYSCAPES_19, num_classes)
    subset = CITYSCAPES_19.subset(num_classes)
    ious = [
        100 * ((prediction == c) & (labels == c)).sum().item() / ((prediction == c) | (labels == c)).sum().item()
        for c in subset
    ]
    assert result.iou == pytest.approx(ious)
    assert result.miou == pytest.approx(sum(ious) / num_classes)
    inside = torch.isin(labels, torch.tensor(subset))
    assert result.pixel_accuracy == pytest.approx(100 * (prediction == labels)[inside].float().mean().item())


def test_json_has_null_for_absent_classes_and_no_nan():
    scores = Scores(K)
    scores.add(torch.zeros(1, 4).long(), torch.zeros(1, 4).long())
    text = json.dumps(scores.result(CLASS_SET).to_json(), allow_nan=False)
    assert json.loads(text)["iou"] == [100.0, None, None]
    assert json.loads(text)["boundary_miou"] is None
