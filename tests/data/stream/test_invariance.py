"""The meaning of a sample number depends on neither ranks nor workers, for all mixtures, weights and subsets."""

import contextlib
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld import rng
from iccld.data.config import DataConfig, DatasetConfig, SetConfig
from iccld.data.stream.stream import TrainingStream
from tests.data.factory import GLOBAL_BATCH_SIZE, config, layout, make_set

NUM_STEPS = 6
SEED = 11


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shards of 13, 6 and 9 pairs of their own, and a list of keys."""
    root = tmp_path_factory.mktemp("mixture")
    places = {name: make_set(root / name, count).location for name, count in (("a", 13), ("b", 6), ("c", 9))}
    (root / "keys.txt").write_text("frame_001\nframe_004\nframe_007\n")
    return places | {"keys": str(root / "keys.txt")}


def mixture(sets: dict[str, str], *, rare: bool, several: bool, num_workers: int = 0) -> DataConfig:
    """Source and target of several sets: whole, the first 60 %, some keys; the target reads no labels."""
    also = {
        "b": SetConfig(shards=sets["b"], weight=0.5, first_percent=60),
        "c": SetConfig(shards=sets["c"], weight=2, keys=sets["keys"]),
    }
    both = DatasetConfig("a", sets["a"], also=also if several else {})
    return config({"source": sets["a"]}, source=both, target=both, rare_class_sampling=rare, num_workers=num_workers)


def sequence(data: DataConfig, world_size: int, accumulation: int, start: int, stop: int) -> dict[Any, Any]:
    """(domain, number) to key, pixels (crop and flip), labels, and the draw that augmentation is made from."""
    found: dict[Any, Any] = {}
    for rank in range(world_size):
        stream = TrainingStream(data, seed=SEED, layout=layout(world_size, rank, accumulation))
        with contextlib.closing(stream.batches(start)) as batches:
            for batch in itertools.islice(batches, (stop - start) * accumulation):
                for domain, part in batch.items():
                    draws = rng.uniform(4, seed=SEED, purpose="jitter", numbers=part["numbers"]).tolist()
                    for j, number in enumerate(part["numbers"].tolist()):
                        assert (domain, number) not in found, "no two ranks take one sample"
                        arrays = [part[name][j].numpy().tobytes() for name in ("images", "labels") if name in part]
                        found[domain, number] = (part["keys"][j], *arrays, draws[j])
    return found


LAYOUTS = st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([0, 1, 3]), st.sampled_from([1, 2]))
REFERENCES: dict[tuple[bool, bool], dict[Any, Any]] = {}


@settings(max_examples=15, deadline=None)
@given(
    rare=st.booleans(),
    several=st.booleans(),
    before=LAYOUTS,
    after=LAYOUTS,
    switch=st.integers(0, NUM_STEPS),
)
def test_ranks_and_workers_change_nothing_even_in_mid_run(
    sets: dict[str, str],
    rare: bool,
    several: bool,
    before: tuple[int, int, int],
    after: tuple[int, int, int],
    switch: int,
) -> None:
    if (rare, several) not in REFERENCES:
        one = mixture(sets, rare=rare, several=several)
        REFERENCES[rare, several] = sequence(one, 1, 1, 0, NUM_STEPS)
    found: dict[Any, Any] = {}
    for (world_size, num_workers, accumulation), start, stop in ((before, 0, switch), (after, switch, NUM_STEPS)):
        data = mixture(sets, rare=rare, several=several, num_workers=num_workers)
        accumulation = min(accumulation, GLOBAL_BATCH_SIZE // world_size)
        found |= sequence(data, world_size, accumulation, start, stop)
    assert sorted(found) == [(d, n) for d in ("source", "target") for n in range(NUM_STEPS * GLOBAL_BATCH_SIZE)]
    assert found == REFERENCES[rare, several]


@pytest.mark.parametrize(("rare", "several"), [(False, True), (True, False)])
def test_a_stream_that_repeats_reads_the_same_again_under_numbers_and_noise_of_its_own(
    sets: dict[str, str], rare: bool, several: bool
) -> None:
    """Image, crop, flip, labels and partner of sample n are those of n modulo the period, from any step on."""
    data, period = mixture(sets, rare=rare, several=several), 2 * GLOBAL_BATCH_SIZE
    plain = sequence(data, 1, 1, 0, 2)
    stream = TrainingStream(data, seed=SEED, layout=layout(2, 1), repeat_after=period, noise={"noise": (2,)})
    for batch in itertools.islice(stream.batches(3), 4):
        numbers = batch["source"]["numbers"].tolist()
        assert min(numbers) >= 3 * GLOBAL_BATCH_SIZE
        for domain, part in batch.items():
            assert part["numbers"].tolist() == numbers
            for j, number in enumerate(numbers):
                key, *arrays, _ = plain[domain, number % period]
                found = [part[name][j].numpy().tobytes() for name in ("images", "labels") if name in part]
                assert (part["keys"][j], *found) == (key, *arrays)
        own = rng.normal((2,), seed=SEED, purpose="noise", numbers=batch["source"]["numbers"], device="cpu")
        assert batch["source"]["noise"].equal(own)


@pytest.mark.parametrize("several", [False, True])
def test_an_epoch_of_each_set_loses_and_repeats_nothing(sets: dict[str, str], several: bool) -> None:
    """Each set gets its share of 10,000 numbers; as many of its own numbers as an epoch has hold each sample once."""
    domain = TrainingStream(mixture(sets, rare=False, several=several), seed=SEED, layout=layout()).domains["target"]
    draws = [domain.order[n] for n in range(10_000)]
    counts = {0: 13, 1: 4, 2: 3} if several else {0: 13}
    for part, size in counts.items():
        drawn = [draw.index for draw in draws if draw.part == part]
        seen = [drawn.count(index) for index in set(drawn)]
        assert len(seen) == size
        assert max(seen) - min(seen) <= 1
    assert {draw.index for draw in draws if draw.part == 2} <= {1, 4, 7}
