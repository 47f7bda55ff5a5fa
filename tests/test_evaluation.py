"""Windows against whole images, every split of the images against one rank, and what is refused."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from iccld.evaluation import evaluate, results_table, sliding_window, whole_image, windowed
from iccld.labels import CITYSCAPES_19, merged_class_set
from iccld.scores import Scores
from iccld.settings import EvaluationConfig

CLASS_SET = merged_class_set(["road", "person", "car"], {0: 0, 1: 0, 11: 1, 13: 2})
K = CLASS_SET.num_classes


def sample(number, labels, image=None):
    image = np.zeros((*labels.shape, 3), np.uint8) if image is None else image
    return {"image": image, "labels": labels, "key": f"frame_{number}", "number": number}


def from_red(images, numbers):
    """A pointwise predict function: the red channel, in units of 1/255, is the class."""
    return torch.nn.functional.one_hot((images[:, 0] * 255).round().long(), K).permute(0, 3, 1, 2).float()


def red(labels):
    return np.stack([labels, labels * 0, labels * 0], -1)


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    batch_size=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_windows_average_to_the_whole_image_for_a_pointwise_predictor(size, window, batch_size, data):
    window = [8 * side for side in window]
    stride = [8 * data.draw(st.integers(1, side // 8)) for side in window]
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))

    def pointwise(images, numbers):
        assert len(images) == len(numbers) <= batch_size
        assert images.shape[2] % 8 == images.shape[3] % 8 == 0
        return images * numbers.view(-1, 1, 1, 1)

    logits = sliding_window(
        pointwise, images, torch.tensor([1, 3]), window=window, stride=stride, batch_size=batch_size
    )
    torch.testing.assert_close(logits, images * torch.tensor([1, 3]).view(2, 1, 1, 1))


@pytest.mark.parametrize("sliding", [False, True])
def test_coarse_logits_of_low_precision_come_back_in_float32_at_the_images_size(sliding):
    def coarse(images, numbers):
        return torch.nn.functional.avg_pool2d(images, 4).bfloat16()

    images = torch.full((1, 3, 20, 12), 0.5)
    logits = windowed(coarse, EvaluationConfig(sliding_window=sliding, window=[16, 8], stride=[8, 8]))(
        images, torch.tensor([0])
    )
    assert logits.dtype == torch.float32
    assert torch.equal(logits, images)


def test_overlapping_windows_are_averaged():
    calls = iter([0.0, 1.0])
    logits = sliding_window(
        lambda images, _: torch.full((1, 1, *images.shape[-2:]), next(calls)),
        torch.zeros(1, 3, 8, 24),
        torch.tensor([0]),
        window=[8, 16],
        stride=[8, 8],
    )
    assert logits[0, 0, 0].tolist() == [0.0] * 8 + [0.5] * 8 + [1.0] * 8


def test_a_window_that_covers_the_image_is_the_whole_image():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, K, 5, padding=2).requires_grad_(False)

    def predict(images, numbers):
        return convolution(images)

    images, numbers = torch.rand(1, 3, 21, 35), torch.tensor([0])
    whole = whole_image(predict, images, numbers)
    assert whole.shape == (1, K, 21, 35)
    assert torch.equal(sliding_window(predict, images, numbers, window=[24, 40], stride=[8, 8]), whole)
    assert torch.equal(windowed(predict, EvaluationConfig(sliding_window=True))(images, numbers), whole)


def test_evaluate_finds_the_truth_at_the_labels_resolution():
    generator = np.random.default_rng(0)
    small = generator.integers(0, K, (5, 6)).astype(np.uint8)
    samples = [
        sample(0, np.kron(small, np.ones((4, 4), np.uint8)), red(np.kron(small, np.ones((2, 2), np.uint8)))),
        sample(1, small, red(small)),
    ]
    result = evaluate(samples, from_red, class_set=CLASS_SET, config=EvaluationConfig())
    assert result.num_images == 2
    assert result.miou > 80  # bilinear corners only
    result = evaluate(samples[1:], from_red, class_set=CLASS_SET, config=EvaluationConfig())
    assert result.miou == 100.0


def test_ranks_with_uneven_shares_give_the_counts_of_one_rank():
    generator = np.random.default_rng(0)
    samples = []
    for number in range(7):
        shape = (12, 16) if number % 3 else (10, 8)
        labels, image = (generator.integers(0, K, shape).astype(np.uint8) for _ in range(2))
        samples.append(sample(number, labels, red(image)))

    def results(shares, batch_size):
        config = EvaluationConfig(batch_size=batch_size)
        sums = []
        for share in shares:
            total = SimpleNamespace(counts=None)

            def keep(counts, total=total):
                total.counts = counts
                return counts + (1 if not counts[-1] else 0)  # an empty share alone has no result

            evaluate(share, from_red, class_set=CLASS_SET, config=config, all_reduce=keep)
            sums.append(total.counts)
        return sum(sums)

    one = results([samples], 1)
    assert one[-1] == 7
    assert torch.equal(results([samples[0::2], samples[1::2]], 2), one)
    assert torch.equal(results([samples[:1], samples[1:], []], 4), one)


def test_all_reduced_counts_are_what_the_result_is_made_of():
    samples = [sample(0, np.zeros((8, 8), np.uint8))]
    result = evaluate(samples, from_red, class_set=CLASS_SET, config=EvaluationConfig(), all_reduce=lambda c: 3 * c)
    assert result.num_images == 3


@pytest.mark.parametrize("sliding", [False, True])
def test_batches_hold_images_of_one_size_and_their_numbers(sliding):
    seen = []

    def predict(images, numbers):
        seen.append(numbers.tolist())
        assert images.dtype == torch.float32 and images.max() <= 1
        return from_red(images, numbers)

    sizes = [8, 8, 8, 16, 8]
    samples = [sample(n, np.zeros((size, size), np.uint8)) for n, size in enumerate(sizes)]
    config = EvaluationConfig(sliding_window=sliding, batch_size=2)
    evaluate(samples, predict, class_set=CLASS_SET, config=config)
    assert seen == ([[0], [1], [2], [3], [4]] if sliding else [[0, 1], [2], [3], [4]])


def test_max_images_counts_by_sample_number_on_every_split():
    samples = [sample(n, np.zeros((8, 8), np.uint8)) for n in range(6)]
    config = EvaluationConfig(max_images=4)
    shares = [evaluate(samples[r::2], from_red, class_set=CLASS_SET, config=config).num_images for r in range(2)]
    assert shares == [2, 2]


def test_results_table_has_a_column_a_result_and_a_row_a_class():
    scores = Scores(K)
    scores.add(torch.zeros(1, 4).long(), torch.zeros(1, 4).long())
    result = scores.result(CLASS_SET)
    console = Console(file=io.StringIO(), width=100)
    console.print(results_table({"stage1": result, "stage2": result}, title="validation"))
    text = console.file.getvalue()
    assert all(word in text for word in ("validation", "stage1", "stage2", "mIoU-3", "100.00", "person"))
    assert "nan" not in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": [512]}, r"evaluation.window=\[512\] must be \[height, width\]"),
        ({"window": [500, 512]}, r"evaluation.window=\[500, 512\] must be .* multiples of 8; use"),
        ({"stride": [0, 8]}, r"evaluation.stride=\[0, 8\] must be"),
        ({"window": [64, 64], "stride": [72, 64]}, r"evaluation.stride=\[72, 64\] must not exceed"),
        ({"batch_size": 0}, "evaluation.batch_size=0 must be at least 1"),
        ({"boundary_width": 0}, "evaluation.boundary_width=0 must be at least 1"),
        ({"num_classes": -1}, "evaluation.num_classes=-1 must be at least 0"),
        ({"max_images": -1}, "evaluation.max_images=-1 must be at least 0"),
    ],
)
def test_configuration_errors_name_setting_value_and_rule(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**settings)


@pytest.mark.parametrize(
    ("samples", "config", "message"),
    [
        ([], EvaluationConfig(), "no image was scored"),
        ([sample(0, np.full((8, 8), 7, np.uint8))], EvaluationConfig(), r"'frame_0' hold \[7\], but class indices"),
        ([sample(0, np.zeros((8, 8), np.uint8))], EvaluationConfig(num_classes=16), "num_classes=16 does not fit"),
    ],
)
def test_bad_input_is_named(samples, config, message):
    with pytest.raises(ValueError, match=message):
        evaluate(samples, from_red, class_set=CLASS_SET, config=config)


def test_a_model_of_another_class_set_is_refused():
    samples = [sample(0, np.zeros((8, 8), np.uint8))]
    with pytest.raises(ValueError, match="tells 3 classes apart, the class set has 19"):
        evaluate(samples, from_red, class_set=CITYSCAPES_19, config=EvaluationConfig())
