from pathlib import Path

import numpy as np
import pytest

from iccld.data.index import sample_dtype
from iccld.data.records import count_classes, without_conflicts


def test_conflicts_equal_those_of_a_slow_reference() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        samples = np.zeros(generator.integers(1, 30), sample_dtype(2))
        samples["key"] = generator.integers(0, 20, len(samples)).astype("S2")
        samples["label_size"] = generator.integers(0, 4, len(samples))
        seen: set[bytes] = set()
        keep = []
        for record in samples:
            keep.append(record["key"] not in seen and (record["label_size"] > 0 or not samples["label_size"].any()))
            seen.add(bytes(record["key"]))
        expected = samples[keep]
        kept, problems = without_conflicts(samples.copy(), [Path("a.tar")])
        np.testing.assert_array_equal(kept, expected)
        assert len(problems) == len(samples) - len(expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint16])
def test_class_pixels(dtype: type) -> None:
    labels = np.array([[0, 0, 18], [255, 7, 255]], dtype)
    assert count_classes(labels).tolist() == [2, *[0] * 6, 1, *[0] * 10, 1]
    with pytest.raises(ValueError, match=r"the label holds 19, 254; labels must hold train ids, 0-18 or 255"):
        count_classes(np.array([[19, 254, 3]], dtype))


def test_absurd_ids_take_no_memory() -> None:
    with pytest.raises(ValueError, match=r"holds -5, 70000, 2147483647;"):
        count_classes(np.array([[2**31 - 1, -5, 70000]], np.int32))
