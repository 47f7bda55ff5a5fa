"""Telemetry of a run while it trains: lines of JSON in files, and wandb (which only this file knows).

None of it ends a run: what cannot be written or sent is said in one line, and training goes on.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from iccld.durable import NotOursError, open_to_append, refuse_links
from iccld.extras import remedy
from iccld.node import uptime
from iccld.outcome import naming, say, words
from iccld.redact import redact, redacted
from iccld.runtime.measure.metric_entries import FINAL
from iccld.runtime.settings import WandbMode

START_S = 45.0  # for wandb to find its server
CALL_S = 60.0  # for whatever else is asked of it; it goes on in the background where that is not enough


_refused: set[Path] = set()  # run directories whose events have no file; said once


class Outlet:
    """A logger beside the run's own files, or nothing once it has failed."""

    name: str

    def __init__(self) -> None:
        self._run: Any = None

    def log(self, facts: Mapping[str, Any], *, step: int) -> None:
        """Log the facts of a step."""
        raise NotImplementedError

    def picture(self, name: str, image: np.ndarray, *, step: int) -> None:
        """Log a picture `(H, W, 3)` uint8 of a step."""
        raise NotImplementedError

    def finish(self) -> None:
        """End it in order."""
        raise NotImplementedError

    def tell(self, tell: Callable[[Any], None]) -> None:
        """Call it with the run. A scheduler may end wandb's own process by the SIGTERM that asks for a save."""
        if (run := self._run) is None:
            return
        try:
            within(CALL_S, lambda: tell(run))
        except Exception as error:
            self._run = None
            say(f"{self.name}: it ended ({one_line(error)}); metrics.jsonl and training go on")


class WandbRun(Outlet):
    """A run of wandb, or nothing once it has failed."""

    name = "wandb"

    def start(self, mode: WandbMode, **facts: Any) -> None:
        """Begin, or go on; `facts` as `wandb.init` takes them. Without network or login, online becomes offline."""
        if mode is WandbMode.disabled:
            return
        try:
            refuse_links(facts["dir"] / "wandb", within=facts["dir"])
        except NotOursError as error:
            say(f"wandb: {error} metrics.jsonl and training go on without it")
            return
        if not (failure := self._try(mode, facts)):
            return
        said = f"wandb: {mode.value} did not start ({failure}); "
        if mode is WandbMode.online:
            if not (failure := self._try(WandbMode.offline, facts)):
                say(f"{said}it is offline, in {facts['dir']}/wandb: `wandb sync` sends that where there is a network")
                return
            said += f"nor did offline ({failure}); "
        say(f"{said}metrics.jsonl and training go on without it")

    def _try(self, mode: WandbMode, facts: Mapping[str, Any]) -> str:
        """Start it; why it did not, if so."""

        def start() -> Any:
            try:
                import wandb  # 1.6 s; only where it is used
            except ModuleNotFoundError as error:
                raise RuntimeError(remedy(error)) from error
            # Its own notes on the process would hold the command line, and the URL of a git remote.
            quiet: dict[str, Any] = {"x_disable_meta": True, "disable_git": True, "save_code": False}
            settings = wandb.Settings(silent=True, console="off", init_timeout=START_S / 2, **quiet)
            try:
                return wandb.init(mode=mode.value, settings=settings, resume="allow", **facts)  # type: ignore[arg-type]
            except Exception:
                wandb.teardown()  # or the name would stay in use
                raise

        try:
            self._run = within(START_S, start)
        except Exception as error:  # whatever it is, it is no reason not to train
            return one_line(error)
        return ""

    def log(self, facts: Mapping[str, Any], *, step: int) -> None:
        """Log the facts on the axis `step`; final scores go into the summary.

        A run that is opened again for them has passed their step, and wandb drops what is logged at an earlier one.
        """
        final = {name: value for name, value in facts.items() if name.startswith(FINAL)}
        self.tell(lambda run: run.summary.update(final) if final else run.log(dict(facts), step=step))

    def picture(self, name: str, image: np.ndarray, *, step: int) -> None:
        """Log a picture `(H, W, 3)` uint8 on the axis `step`."""

        def add(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(image)}, step=step)

        self.tell(add)

    def finish(self) -> None:
        """Send what is left, and end the run."""
        self.tell(lambda run: run.finish())


def within(limit_s: float, function: Callable[[], Any]) -> Any:
    """Return or raise what the function does. Raises TimeoutError if that takes longer; the function goes on."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = function()
        except BaseException as error:  # raised again by the thread that waits
            outcome["error"] = error

    thread = threading.Thread(target=run, name="telemetry", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {limit_s:g} s")
    if "error" in outcome:
        raise RuntimeError(one_line(outcome["error"])) from outcome["error"]
    return outcome["value"]


def one_line(error: BaseException) -> str:
    return redact(" ".join(str(error).split()) or repr(error))[:300]


class Lines:
    """A file of lines that grows by whole ones; those that found no room are tried again with the next."""

    MOST = 10_000  # that are kept

    def __init__(self, path: Path) -> None:
        self.path, self._left = path, ""

    def add(self, entry: Mapping[str, Any]) -> None:
        text = self._left + json.dumps(entry) + "\n"
        try:
            append(self.path, text)
        except (OSError, NotOursError) as error:
            if not self._left:
                remedy = "" if isinstance(error, NotOursError) else "; make room there"
                say(f"{error}{remedy}: training goes on, and tries again")
            self._left = "".join(text.splitlines(keepends=True)[-self.MOST :])
        else:
            self._left = ""


def append(path: Path, text: str) -> None:
    """Add whole lines to a file, or nothing; after a line that a crash has torn, on a new one."""
    data = text.encode()
    with naming(path, path.name), open_to_append(path) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            data = b"\n" * (file.read(1) != b"\n") + data
        try:
            while data:
                data = data[os.write(file.fileno(), data) :]
        except OSError:  # the disk is full now
            os.truncate(file.fileno(), end)
            raise


def write_event(run_dir: Path, kind: str, **facts: Any) -> None:
    """Write one line of events.jsonl with two times: the clock, and the seconds of this boot, which nobody sets."""
    try:
        append(
            run_dir / "events.jsonl",
            json.dumps({"time": time.time(), **uptime(), "event": kind, **redacted(facts)}) + "\n",
        )
    except NotOursError as error:
        if run_dir not in _refused:
            say(f"{error} Training goes on; the event {kind!r} and later ones are not in it")
        _refused.add(run_dir)
    except OSError as error:
        say(f"{words(error)}; the event {kind!r} is not in it")
