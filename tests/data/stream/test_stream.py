import contextlib
import itertools
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld import rng
from iccld.batch_layout import BatchLayout
from iccld.data.config import DataConfig, DatasetConfig, SetConfig
from iccld.data.stream.stream import Batch, TrainingStream
from iccld.data.stream.workers import MAX_TMPDIR_BYTES, WorkerDied
from tests.data.factory import CROP, GLOBAL_BATCH_SIZE, config, layout

NOISE = {"noise": (2, 3)}


def micro_batches(config: DataConfig, layout: BatchLayout, start_step: int, num_steps: int) -> list[Batch]:
    with contextlib.closing(TrainingStream(config, seed=5, layout=layout, noise=NOISE).batches(start_step)) as stream:
        return list(itertools.islice(stream, num_steps * layout.num_accumulation))


def samples(batch: Batch) -> Iterator[tuple[tuple[str, int], tuple[Any, ...]]]:
    """(domain, number) to everything else about each sample of a batch."""
    for domain, part in batch.items():
        for j, number in enumerate(part["numbers"].tolist()):
            arrays = [part[name][j].numpy().tobytes() for name in ("images", "labels", "valid", *NOISE) if name in part]
            yield (domain, number), (part["keys"][j], *arrays)


def all_samples(config: DataConfig, world_size: int, accumulation: int, start: int, steps: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for rank in range(world_size):
        for batch in micro_batches(config, layout(world_size, rank, accumulation), start, steps):
            for name, sample in samples(batch):
                assert name not in found, "no two ranks take the same sample"
                found[name] = sample
    return found


def test_shapes_and_types(folders: dict[str, str]) -> None:
    (batch,) = micro_batches(config(folders), layout(), 0, 1)
    assert set(batch) == {"source", "target"}
    source, target = batch["source"], batch["target"]
    assert set(source) == {"images", "labels", "valid", "numbers", "keys", *NOISE}
    assert set(target) == {"images", "valid", "numbers", "keys"}
    for part in (source, target):
        assert (part["images"].shape, part["images"].dtype) == ((8, 3, *CROP), torch.uint8)
        assert (part["valid"].shape, part["valid"].dtype) == ((8, CROP[0], 1), torch.bool)
        assert (part["numbers"].dtype, part["numbers"].tolist()) == (torch.int64, list(range(8)))
        assert len(part["keys"]) == 8 and isinstance(part["keys"][0], str)
    assert (source["labels"].shape, source["labels"].dtype) == ((8, *CROP), torch.uint8)
    drawn = rng.normal((2, 3), seed=5, purpose="noise", numbers=source["numbers"], device="cpu")
    assert torch.equal(source["noise"], drawn)


@pytest.fixture(scope="module")
def reference(folders: dict[str, str]) -> dict[Any, Any]:
    """Every sample of steps 0-6, as one process without workers sees it."""
    return all_samples(config(folders), 1, 1, 0, 7)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_samples_do_not_depend_on_ranks_and_workers(
    folders: dict[str, str], reference: dict[Any, Any], world_size: int, accumulation: int, num_workers: int
) -> None:
    found = all_samples(config(folders, num_workers=num_workers), world_size, accumulation, 4, 3)
    numbers = range(4 * GLOBAL_BATCH_SIZE, 7 * GLOBAL_BATCH_SIZE)
    assert found == {(domain, n): reference[domain, n] for domain in ("source", "target") for n in numbers}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_resuming_at_any_step_with_any_layout_continues(
    folders: dict[str, str], reference: dict[Any, Any], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, 6))
    world_size = data.draw(st.sampled_from([1, 2, 4, 8]))
    accumulation = data.draw(st.sampled_from([a for a in (1, 2, 4, 8) if a * world_size <= GLOBAL_BATCH_SIZE]))
    found = all_samples(config(folders), world_size, accumulation, start, 7 - start)
    assert found == {name: sample for name, sample in reference.items() if name[1] >= start * GLOBAL_BATCH_SIZE}


def test_micro_batches_come_in_order(folders: dict[str, str]) -> None:
    batches = micro_batches(config(folders, num_workers=2), layout(2, 1, 2), 3, 3)
    numbers = [batch["target"]["numbers"].tolist() for batch in batches]
    assert numbers == [[26, 27], [30, 31], [34, 35], [38, 39], [42, 43], [46, 47]]


def test_a_batch_comes_from_its_worker_in_one_piece(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fetch waits for a thread of the worker, and the step for the fetch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # there, a thread copies it to pinned memory
    (batch,) = micro_batches(config(folders, num_workers=1), layout(), 0, 1)
    fetched = [batch[name][key] for name in batch for key in ("images", "labels", "valid") if key in batch[name]]
    assert len(fetched) == 5 and all(tensor.is_shared() for tensor in fetched)
    assert len({tensor.untyped_storage().data_ptr() for tensor in fetched}) == 1
    assert not any(part["numbers"].is_shared() for part in batch.values()), "what the host keeps keeps nothing else"


def test_an_epoch_of_the_target_loses_and_repeats_nothing(folders: dict[str, str]) -> None:
    batches = micro_batches(config(folders, num_workers=1), layout(), 0, 11)
    keys = [key for batch in batches for key in batch["target"]["keys"]]
    for epoch in range(8):
        assert sorted(keys[11 * epoch : 11 * epoch + 11]) == [f"frame_{i:03d}" for i in range(11)]


def test_seeds_differ_and_domains_are_drawn_apart(folders: dict[str, str]) -> None:
    def keys(seed: int, domain: str) -> list[str]:
        same = {**folders, "target": folders["source"]}
        stream = TrainingStream(config(same, rare_class_sampling=False), seed=seed, layout=layout())
        return next(stream.batches(0))[domain]["keys"]

    assert keys(1, "source") == keys(1, "source")
    assert keys(1, "source") != keys(2, "source")
    assert keys(1, "source") != keys(1, "target")


def test_streaming_leaves_the_global_generators_alone(folders: dict[str, str]) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    micro_batches(config(folders), layout(), 0, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_without_target_there_is_none_and_target_labels_come_on_request(folders: dict[str, str]) -> None:
    (batch,) = micro_batches(config({"source": folders["source"]}), layout(), 0, 1)
    assert set(batch) == {"source"}
    labelled = config({**folders, "target": folders["source"]})
    for wanted in (False, True):
        stream = TrainingStream(labelled, seed=0, layout=layout(), target_labels=wanted)
        target = next(stream.batches(0))["target"]
        assert ("labels" in target) is wanted
        images = target["images"] if not wanted else images  # noqa: F821
        assert torch.equal(target["images"], images), "crops of the target do not look at its labels"


def test_workers_outlive_the_scheduler_s_signals_and_end_with_the_stream(folders: dict[str, str]) -> None:
    before = set(multiprocessing.active_children())
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    old = {number: signal.signal(number, lambda *_: os._exit(7)) for number in numbers}
    try:
        stream = TrainingStream(config(folders, num_workers=2), seed=5, layout=layout()).batches(0)
        first = next(stream)  # one worker may not have begun
        workers = [child for child in multiprocessing.active_children() if child not in before]
        assert len(workers) == 2
        for worker, name in itertools.product(workers, ("USR1", "TERM", "INT")):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # not the parent, as a scheduler
        rest = list(itertools.islice(stream, 12))
        assert all(worker.is_alive() for worker in workers)
        assert len({n for batch in [first, *rest] for n in batch["source"]["numbers"].tolist()}) == 13 * 8
        stream.close()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0


def with_worker(folders: dict[str, str]) -> tuple[Generator[Batch, None, None], Any]:
    """A stream that has begun, and its worker."""
    before = set(multiprocessing.active_children())
    stream = TrainingStream(config(folders, num_workers=1), seed=5, layout=layout()).batches(0)
    next(stream)
    (worker,) = set(multiprocessing.active_children()) - before
    return stream, worker


def test_a_parent_ends_its_workers_by_sigterm(folders: dict[str, str]) -> None:
    stream, worker = with_worker(folders)
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(10)
    assert worker.exitcode == 0
    stream.close()


def server_of(worker: Any) -> psutil.Process:
    server = psutil.Process(worker.pid).parent()
    assert server is not None
    return server


def test_workers_are_forked_from_a_process_without_threads(folders: dict[str, str]) -> None:
    stream, worker = with_worker(folders)
    server = server_of(worker)
    assert server.pid != os.getpid() and server.ppid() == os.getpid() and server.num_threads() == 1
    (mask,) = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{server.pid}/status").read_text())
    held = int(mask, 16)
    assert all(held >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
    stream.close()


@pytest.mark.parametrize("killed", ["server", "worker_at_hand_over"])
def test_whatever_breaks_when_a_worker_ends_is_one_error(folders: dict[str, str], killed: str) -> None:
    stream, worker = with_worker(folders)
    if killed == "server":
        server_of(worker).kill()
    else:
        time.sleep(1)  # batches lie ready, whose memory the worker hands over when they are taken
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"^a loader worker"):
        list(itertools.islice(stream, 20))
    psutil.wait_procs([psutil.Process(worker.pid)] if psutil.pid_exists(worker.pid) else [], timeout=10)
    assert not psutil.pid_exists(worker.pid)


@pytest.mark.parametrize(("length", "status"), [(MAX_TMPDIR_BYTES, 0), (MAX_TMPDIR_BYTES + 1, 1)])
def test_a_folder_for_temporary_files_that_is_too_long_is_named(
    folders: dict[str, str], length: int, status: int
) -> None:
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))
    longest = temporary / ("x" * (length - len(str(temporary)) - 1))
    longest.mkdir()
    code = "import sys; from tests.data.stream.test_stream import *; with_worker({'source': sys.argv[1]})[0].close()"
    environment = {**os.environ, "TMPDIR": str(longest)}
    command = [sys.executable, "-c", code, folders["source"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    shutil.rmtree(temporary)
    assert done.returncode == status, done.stderr
    assert (f"ValueError: TMPDIR={longest} is too long" in done.stderr) == bool(status)


def test_no_process_is_left_of_a_killed_training(folders: dict[str, str]) -> None:
    """Neither workers nor the processes that multiprocessing starts beside them."""
    code = "import sys; from tests.data.stream.test_stream import *; kept = with_worker({'source': sys.argv[1]})"
    code += "; print(kept[1].pid, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, folders["source"]]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert training.stdout
    worker = int(training.stdout.readline())
    children = psutil.Process(training.pid).children(recursive=True)
    assert worker in {child.pid for child in children}
    time.sleep(1)  # it has made its batches, and waits
    training.kill()
    training.wait()
    _gone, left = psutil.wait_procs(children, timeout=15)
    assert not left


def test_a_worker_is_sent_no_records(folders: dict[str, str]) -> None:
    """A worker maps the files again; else a set of a million samples would be copied, and its copy pickled."""
    (samples,) = (
        part.index.samples for part in TrainingStream(config(folders), seed=0, layout=layout()).domains["source"].parts
    )
    for view in (samples["class_pixels"], samples[3:7]["height"], samples["key"][2:], samples["class_pixels"][1:, 4]):
        data = ForkingPickler.dumps(view)
        assert np.array_equal(pickle.loads(data), view)
        assert len(data) == len(ForkingPickler.dumps(view[:1]))


def test_a_killed_worker_is_said_in_one_line(folders: dict[str, str]) -> None:
    stream, worker = with_worker(folders)
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.5)  # in the midst of a step, where torch's own handler would raise
    with pytest.raises(
        WorkerDied, match=r"^a loader worker \(process \d+\) was killed by signal 9; if memory does not .*num_workers"
    ):
        list(itertools.islice(stream, 20))


def test_a_fault_of_the_program_is_not_taken_for_a_killed_worker(folders: dict[str, str]) -> None:
    stream = TrainingStream(config(folders), seed=5, layout=layout())
    stream.domains["source"].batch = lambda numbers: torch.ones(2) @ torch.ones(3)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="size"):
        next(stream.batches(0))


def test_other_keys_and_only_those_are_another_set(folders: dict[str, str], tmp_path: Path) -> None:
    def fingerprint(keys: list[int], percent: float = 100) -> dict[str, Any]:
        path = tmp_path / "keys.txt"
        path.write_text("".join(f"frame_{key:03d}\n" for key in keys))
        source = DatasetConfig("s", folders["source"], first_percent=percent, keys=str(path) if keys else "")
        return TrainingStream(config(folders, source=source), seed=0, layout=layout()).fingerprints()["source"]

    assert fingerprint([1, 2, 3]) == fingerprint([3, 1, 2]) != fingerprint([1, 2, 4])
    assert fingerprint([]) == fingerprint([], 100) != fingerprint([], 50)


def test_sets_are_told_apart_by_name_not_by_place(folders: dict[str, str]) -> None:
    def keys(names: tuple[str, ...]) -> list[str]:
        also = {name: SetConfig(shards=folders["source"], weight=len(name)) for name in names}
        source = DatasetConfig("s", folders["source"], also=also)
        return next(TrainingStream(config(folders, source=source), seed=0, layout=layout()).batches(0))["source"][
            "keys"
        ]

    assert keys(("b", "ccc")) == keys(("ccc", "b"))
