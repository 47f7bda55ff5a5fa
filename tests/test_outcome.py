"""Exit statuses say who must act when a command ends by an error."""

import errno
import os
import pickle
import socket
from pathlib import Path

import pytest

from iccld.data.storage.base import MissingShard, StorageError, Unreachable
from iccld.data.stream.workers import WorkerDied
from iccld.outcome import (
    AGAIN,
    REFUSED,
    Interrupted,
    ToldByRank0,
    blaming_the_world,
    is_understood,
    naming,
    plain,
    status_of,
    words,
)
from iccld.runtime.checkpoint.errors import CheckpointError
from iccld.runtime.checkpoint.store import UnsavedError
from iccld.runtime.measure.metrics import NonFiniteError

THE_USER = [
    ValueError("data.crop_size=500 must be a multiple of 8"),
    NonFiniteError("loss is nan"),
    CheckpointError("all are damaged"),
    MissingShard("a.tar does not exist"),
    StorageError("access is denied"),
    OSError("a batch does not fit"),
    *(OSError(number, os.strerror(number), "x") for number in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EROFS)),
]
NUMBERS = ("ENOSPC", "EDQUOT", "EIO", "ESTALE", "ECONNRESET", "ETIMEDOUT", "EHOSTUNREACH", "EMFILE", "ENOMEM", "EAGAIN")
THE_WORLD = [
    WorkerDied("a loader worker ended"),
    Unreachable("failed after 7 attempts"),
    UnsavedError("checkpoint was not written"),
    Interrupted("rank 3: gone"),
    ConnectionResetError("peer"),
    TimeoutError("no answer"),
    socket.gaierror(socket.EAI_AGAIN, "try again"),
    *(OSError(getattr(errno, name), name) for name in NUMBERS),
]


@pytest.mark.parametrize("error", THE_USER, ids=repr)
def test_what_the_user_must_mend_is_refused(error: Exception):
    assert status_of(error) == REFUSED == status_of(pickle.loads(pickle.dumps(plain(error))))


@pytest.mark.parametrize("error", THE_WORLD, ids=repr)
def test_what_the_world_did_is_tried_again(error: Exception):
    assert status_of(error) == AGAIN == status_of(pickle.loads(pickle.dumps(plain(error))))
    assert str(plain(error)) == words(error) == words(plain(error))


@pytest.mark.parametrize("error", [*THE_USER, *THE_WORLD], ids=repr)
@pytest.mark.parametrize("has_trained", [False, True])
def test_after_the_first_step_no_error_of_the_system_is_refused(error: Exception, has_trained: bool):
    with pytest.raises(type(error) if not has_trained else Exception) as raised, blaming_the_world(lambda: has_trained):
        raise error
    expected = AGAIN if has_trained and isinstance(error, OSError) else status_of(error)
    assert status_of(raised.value) == expected == status_of(plain(error, has_trained=has_trained))


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("CUDA error: uncorrectable ECC error\nmore", AGAIN),
        ("CUDA error: device-side assert triggered", None),
    ],
)
def test_a_lost_device_is_one_line_and_a_fault_of_the_program_keeps_its_traceback(text: str, status: int | None):
    lost = type("AcceleratorError", (RuntimeError,), {})(text)
    with pytest.raises((RuntimeError, Interrupted)) as raised, blaming_the_world(lambda: False):
        raise lost
    assert (status_of(raised.value) if isinstance(raised.value, Interrupted) else None) == status
    assert "\n" not in str(raised.value)


def test_a_full_disk_names_file_content_and_remedy():
    with pytest.raises(OSError) as raised, naming(Path("/dev/full"), "the scores"), Path("/dev/full").open("w") as file:
        file.write("x")
        file.flush()
    said = words(raised.value)
    assert status_of(raised.value) == AGAIN
    assert all(word in said for word in ("/dev/full", "the scores could not be written", "No space left", "make room"))


@pytest.mark.parametrize(("has_trained", "status"), [(False, 2), (True, 75)])
def test_a_rank_whose_error_rank_0_tells_ends_with_the_status_of_rank_0(has_trained: bool, status: int):
    error = OSError("a damaged file")
    with pytest.raises(ToldByRank0) as told, blaming_the_world(lambda: has_trained):
        raise ToldByRank0(error)
    with pytest.raises(OSError, match="a damaged file") as raised, blaming_the_world(lambda: has_trained):
        raise error
    assert told.value.code == status == status_of(raised.value)


def test_a_lack_of_memory_or_of_a_deterministic_kernel_is_told_with_its_remedy():
    short = "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED\nException raised from"
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried 2 GiB"), RuntimeError(short)):
        assert is_understood(error) and words(error).startswith("out of memory (") and "\n" not in words(error)
    strict = RuntimeError("grid_sampler_2d_backward_cuda does not have a deterministic implementation, but you set")
    assert is_understood(strict) and words(strict) == (
        "grid_sampler_2d_backward_cuda does not have a deterministic implementation on this device; "
        "set engine.deterministic=false, or use another backbone"
    )
    assert not is_understood(RuntimeError("shapes do not fit"))
