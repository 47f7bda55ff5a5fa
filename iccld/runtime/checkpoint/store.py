"""Checkpoints that appear whole or not at all.

    stage1/checkpoints/step_00012000/  manifest.json  rank_00000.safetensors  rank_00001.safetensors ...
    stage1/checkpoints/latest          the name of the newest whole one

Every rank writes its file into `step_N.tmp`; when all have, rank 0 writes the manifest (sizes, checksums, where each
tensor lies), the folder is renamed, `latest` replaced, and only then are older ones removed. The step path pays the
copy to host memory; a thread on each rank does the rest. Nothing is ever unpickled.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iccld.durable import clear_away, holds_only, is_real_folder, make_folder, scratch_folder, sync, write_whole
from iccld.outcome import Interrupted
from iccld.runtime.checkpoint.errors import CheckpointError, DamagedError, ForeignFormatError
from iccld.runtime.checkpoint.manifest import STEP_FOLDER, Checkpoint, pointed_at, verify, write_manifest
from iccld.runtime.checkpoint.pieces import Run, join_tables, write_runs
from iccld.runtime.faults.ending import await_at_the_end
from iccld.runtime.ranks import Ranks
from iccld.runtime.settings import CheckpointConfig

ALIGNMENT = 64  # bytes
PIECE_BYTES = 1 << 28
SCRATCH = re.compile(r"step_\d{8}(\.[0-9a-f]{8})?\.tmp")
is_torn = holds_only(r"rank_\d{5}\.safetensors|manifest\.json")  # what a save writes, and nothing else


class UnsavedError(CheckpointError, Interrupted):
    """Error: a checkpoint could not be written; the one before it is whole."""


class CheckpointStore:
    """The checkpoints of one stage of one run. `announce` is called on every rank when a step is durable."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        ranks: Ranks,
        *,
        report: Callable[[str], None] = print,
        announce: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.folder, self.config, self.ranks = folder, config, ranks
        self.report, self.announce = report, announce
        self._newest_saved: int | None = None
        self._damaged: set[str] = set()  # those that rank 0 found damaged
        self._said: set[str] = set()
        self._memory: list[Tensor] = []
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def save(self, step: int, runs: Mapping[str, Run], about: Mapping[str, Any]) -> None:
        """Write what this rank holds (`runs`) and `about` (JSON, the same on all ranks) as the checkpoint of `step`.

        Call on every rank. Returns when the runs are in host memory, or, not asynchronous, when the checkpoint is
        durable; at once for the step that was saved last. Raises CheckpointError for the save before, if that failed.
        """
        self.wait()
        if step == self._newest_saved:
            return
        held = self._to_host(runs)
        self._saving = self._thread.submit(self._write, step, held, dict(about))
        await_at_the_end(self._saving)
        if not self.config.asynchronous:
            self.wait()

    @property
    def has_failed(self) -> bool:
        """Tell whether the last save has failed, so that `wait` would raise."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Wait until the last save is durable. Raises CheckpointError on all ranks if it failed on one."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _to_host(self, runs: Mapping[str, Run]) -> dict[str, Run]:
        """Copy into memory that is kept: touching fresh memory costs more than the copy."""
        on_device = any(run.data.is_cuda for run in runs.values())
        places, lengths = in_pieces([run.data.nbytes for run in runs.values()], length=PIECE_BYTES)
        if [len(piece) for piece in self._memory] != lengths:
            self._memory = [torch.empty(length, dtype=torch.uint8, pin_memory=on_device) for length in lengths]
        held = {}
        for (name, run), (piece, begin) in zip(runs.items(), places, strict=True):
            copy = self._memory[piece][begin:][: run.data.nbytes].view(run.data.dtype).view(run.data.shape)
            copy.copy_(run.data, non_blocking=True)
            held[name] = Run(run.shape, run.start, copy)
        if on_device:
            torch.cuda.current_stream().synchronize()
        return held

    def _write(self, step: int, runs: Mapping[str, Run], about: Mapping[str, Any]) -> None:
        """Write the files, in the background thread of every rank."""
        begin = time.monotonic()
        final = self.folder / f"step_{step:08d}"
        failure = (
            f"checkpoint {final} was not written; the one before it is whole. Make room, and run the command again"
        )
        together, is_main = partial(_together, self.ranks.gather_in_background, kind=UnsavedError), self.ranks.is_main
        file = f"rank_{self.ranks.rank:05d}.safetensors"
        scratch = together(lambda: self._new_scratch(final) if is_main else None, failure)[0]
        written = together(lambda: {file: write_runs(scratch / file, runs)}, failure)
        files = {name: facts for of_rank in written for name, facts in of_rank.items()}
        manifest = {"step": step, "save_s": round(time.monotonic() - begin, 3), **about}
        together(lambda: self._commit(scratch, final, manifest, files) if is_main else None, failure)
        self._newest_saved = step
        try:
            self.announce(step)
        except OSError as error:  # it is durable, whether or not that could be said
            self.report(f"checkpoint {final} is whole, but that could not be written down ({error})")

    def _new_scratch(self, final: Path) -> Path:
        """Make the folder that becomes `final`; torn ones are removed, strangers' of such names are left."""
        make_folder(self.folder, within=self.folder.parent)
        for torn in self.folder.glob("step_*.tmp"):
            if not (SCRATCH.fullmatch(torn.name) and is_torn(torn)):
                self._say_once(f"{torn} is no checkpoint that was torn; it is left as it is")
            elif why := clear_away(torn):
                self._say_once(f"{torn} cannot be removed ({why}); it is left, and tried again before the next save")
        return scratch_folder(final, is_ours=is_torn)

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self.report(what)

    def _commit(self, scratch: Path, final: Path, manifest: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        tensors = join_tables([facts["tensors"] for facts in files.values()])
        sizes = {name: {"size": facts["size"], "sha256": facts["sha256"]} for name, facts in files.items()}
        write_manifest(scratch, {**manifest, "files": sizes, "tensors": tensors})
        sync(scratch)
        self._make_way(final)
        scratch.rename(final)
        sync(self.folder)
        write_whole(self.folder / "latest", final.name)
        self._prune(final)

    def _make_way(self, final: Path) -> None:
        """Clear the place of `final`: a damaged checkpoint there is removed, another is renamed and kept."""
        if final.name in self._damaged and is_real_folder(final):
            clear_away(final)
        if os.path.lexists(final):
            aside = final.with_suffix(f".aside_{time.time_ns()}")
            final.rename(aside)
            self.report(f"{final} was passed over; it is kept as {aside.name}")
        self._damaged.discard(final.name)

    def _prune(self, newest: Path) -> None:
        damaged = [folder for folder in self.folders() if folder.name in self._damaged]
        whole = [folder for folder in self.folders() if folder.name <= newest.name and folder not in damaged]
        for old in whole[: -self.config.keep] + damaged:
            if old.is_symlink():
                self._say_once(f"{old} is a link; it is left as it is")
                continue
            if why := clear_away(old):
                self._say_once(f"{old} cannot be removed ({why}); it is left, and tried again after the next save")

    def folders(self) -> list[Path]:
        """Return the committed checkpoints' folders, oldest first."""
        return sorted(p for p in self.folder.glob("step_*") if p.is_dir() and STEP_FOLDER.fullmatch(p.name))

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint; rank 0 looks for it, so that all ranks go on from the same one.

        Broken and unreadable ones are reported by name and passed over; if no other is left, that is an error.
        """
        failure = f"no checkpoint in {self.folder} can be used"
        found: Checkpoint | None = None

        def find() -> None:
            nonlocal found
            found = self._find_newest() if self.ranks.is_main else None

        _together(self.ranks.gather, find, failure)
        return self.ranks.from_main(found)  # not gathered: a manifest of many ranks is large

    def _point_at(self, newest: Path) -> None:
        """Let `latest` name it again: a kill came between rename and `latest`, or the one it names is damaged."""
        latest = self.folder / "latest"
        if pointed_at(self.folder) != newest.name:
            write_whole(latest, newest.name)

    def _find_newest(self) -> Checkpoint | None:
        folders = self.folders()
        for folder in reversed(folders):
            try:
                checkpoint = verify(folder)
            except ForeignFormatError:
                raise
            except DamagedError as error:
                self._damaged.add(folder.name)
                self.report(str(error))
            except OSError as error:
                self.report(f"checkpoint {folder} cannot be read ({error}); it is passed over, and kept.")
            else:
                with contextlib.suppress(OSError):  # a folder that cannot be written fails at the next save, by name
                    self._point_at(folder)
                return checkpoint
        if folders:
            raise CheckpointError(
                f"all {len(folders)} are damaged or unreadable; mend the disk, restore one from a copy, or remove the "
                f"folder to start anew"
            )
        return None


def in_pieces(sizes: Sequence[int], *, length: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Place blocks of these sizes in pieces of memory: return (piece, first byte) of each, and the pieces' lengths.

    A piece has at most `length` bytes, unless one block is larger. Pinned memory is given out in powers of two: a piece
    for each block would take up to twice as much, and so would a single piece.
    """
    places: list[tuple[int, int]] = []
    lengths: list[int] = []
    for size in sizes:
        aligned = -(-size // ALIGNMENT) * ALIGNMENT
        if not lengths or lengths[-1] + aligned > length:
            lengths.append(0)
        places.append((len(lengths) - 1, lengths[-1]))
        lengths[-1] += aligned
    return places, lengths


def _together(
    gather: Callable[[Any], list[Any]],
    work: Callable[[], Any],
    failure: str,
    kind: type[CheckpointError] = CheckpointError,
) -> list[Any]:
    """Do the work on every rank and wait for all; if one rank fails, all raise, and none is left waiting."""
    try:
        outcome = (work(), "")
    except Exception as error:  # a full disk comes as OSError or RuntimeError
        outcome = (None, f"{type(error).__name__}: {error}")
    outcomes = gather(outcome)
    failures = [f"rank {rank}: {message}" for rank, (_, message) in enumerate(outcomes) if message]
    if failures:
        raise kind(f"{failure} ({'; '.join(failures)}).")
    return [value for value, _ in outcomes]
