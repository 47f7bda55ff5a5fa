from pathlib import Path

import numpy as np

from iccld.data.shards.records import without_conflicts
from iccld.data.storage.index import sample_dtype


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
