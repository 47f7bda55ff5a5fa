"""Diagnostics of a step: counts by hand, no gradient, and sums that do not depend on the split."""

import pytest
import torch

from iccld.labels import IGNORE_INDEX
from iccld.stages.base import to_float
from iccld.stages.diagnostics import CLASSES, DISAGREEMENT, class_counts, disagreement, thinned
from iccld.stages.settings import PseudoLabelSource
from tests.factory import random_batch
from tests.stages.test_adversarial import make_stage as make_second_stage
from tests.stages.test_segmentation import make_stage, prepared


def blocks(*rows: list[int]) -> torch.Tensor:
    """`(1, H, W)` uint8 labels in blocks of 4 x 4 pixels."""
    return torch.tensor(rows).repeat_interleave(4, 0).repeat_interleave(4, 1)[None].to(torch.uint8)


def test_thinned_labels_are_a_pixel_of_each_cell():
    labels = blocks([0, 1], [2, 3])
    assert thinned(labels).tolist() == [[[0, 1], [2, 3]]]
    assert thinned(labels)[0].shape == (2, 2)


def test_classes_are_counted_in_pseudo_labels_and_source():
    pseudo, source = blocks([0, 0, 2], [2, 2, IGNORE_INDEX]), blocks([0, 1, 1], [1, 1, IGNORE_INDEX])
    assert class_counts(pseudo, source, num_classes=3).tolist() == [[2, 0, 3], [1, 4, 0]]


def test_disagreement_counts_where_the_student_is_not_of_the_teachers_mind():
    labels = blocks([0, 1, 2], [2, 1, 0])
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 0], [1, 1, 1]]]), 3).permute(0, 3, 1, 2).float()
    where = torch.tensor([[[True, True, True], [True, False, False]]])
    assert disagreement(logits, labels, where).tolist() == [2, 4]


def test_stage_1_tells_of_its_pseudo_labels_and_its_student():
    stage = make_stage()
    inputs = prepared(stage, range(4))
    metrics = stage.module(inputs).metrics
    assert metrics[CLASSES][1].sum() == 4 * 32 * 64 / 16
    assert metrics[CLASSES][0].sum() == 4 * 32 * 64 / 16
    differing, pixels = metrics[DISAGREEMENT].tolist()
    assert 0 < pixels < 4 * 32 * 64 / 16 and 0 <= differing <= pixels
    assert not metrics[DISAGREEMENT].requires_grad
    # A student that always says the pseudo-labels' class agrees everywhere.
    target = thinned(inputs.tensors["mixed_labels"])[inputs.tensors["mixed_is_target"]]
    assert len(target) == pixels


def test_the_margins_of_target_images_do_not_count():
    stage, batch = make_stage(), random_batch(num_classes=5, numbers=range(2))
    batch["target"]["valid"][:, :16] = False
    with torch.no_grad():
        counts = stage.prepare(batch, 0).tensors[CLASSES]
    assert counts[0].sum() == 2 * 16 * 64 / 16 and counts[1].sum() == 2 * 32 * 64 / 16


def test_with_the_targets_true_labels_there_are_no_pseudo_labels_to_tell_of():
    stage, batch = make_stage(target_labels=True), random_batch(num_classes=5, numbers=range(2))
    batch["target"]["labels"] = batch["source"]["labels"]
    with torch.no_grad():
        inputs = stage.prepare(batch, 0)
    assert stage.module(inputs).metrics.keys() == {"confident"}


@pytest.mark.parametrize("source", PseudoLabelSource)
def test_stage_2_tells_of_the_pseudo_labels_that_it_uses(source: PseudoLabelSource):
    stage = make_second_stage(task_weight=1.0, pseudo_labels=source)
    batch = random_batch(num_classes=19, numbers=range(4))
    batch["target"]["valid"][:, :16] = False
    with torch.no_grad():
        inputs = stage.prepare(batch, 0)
    counts = stage.module(inputs).metrics[CLASSES]
    assert counts.dtype == torch.float32 and counts.sum(dim=1).tolist() == [4 * 16 * 64 / 16, 4 * 32 * 64 / 16]
    if source is PseudoLabelSource.stage1:
        with torch.no_grad():
            labels = stage.model.segment(to_float(batch["target"]["images"])).argmax(dim=1)
        expected = torch.bincount(thinned(labels)[:, 4:].flatten(), minlength=19)
        assert torch.equal(counts[0], expected.float())
    assert CLASSES not in make_second_stage().prepare(batch, 0).tensors, "no one asks for labels"


@pytest.mark.parametrize("name", [CLASSES, DISAGREEMENT])
def test_the_sums_of_micro_batches_are_those_of_the_batch(name: str):
    stage = make_stage()
    whole = stage.module(prepared(stage, range(4))).metrics[name]
    parts = [stage.module(prepared(stage, part)).metrics[name] for part in (range(1), range(1, 4))]
    assert torch.equal(sum(parts), whole)
