"""`iccld doctor`: which parts of this machine fit a run, and what to do about the others; a text for bug reports.

Exit statuses: 0, nothing is wrong (notes may be there); 2, something must be mended; 75, this machine fails, and
another one may do. The text has no secrets, no name of the user or the machine, and `~` for the home folder.
"""

import contextlib
import fcntl
import getpass
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from iccld import __version__
from iccld.data.processes import usable_cpus
from iccld.durable import open_lock, write_whole
from iccld.extras import remedy, version_of
from iccld.models.attention import check_backend, default_device_type
from iccld.models.settings import AttentionBackend
from iccld.outcome import AGAIN, REFUSED, status_of, words
from iccld.redact import redact, without_known
from iccld.runtime.faults.preflight import check_device, check_shared_memory

FINE, NOTE, WRONG = "ok", "note", "WRONG"
SLOW_S = 0.1
"""The most seconds until a small file is on the disk; a local disk takes a few milliseconds."""
SHARED_MEMORY_BYTES = 64 << 20
"""The bytes that a container has in /dev/shm by default."""


@dataclass(frozen=True)
class Finding:
    """Line of the report: a mark, what was tried, what was found, and the exit status if that is wrong."""

    mark: str
    about: str
    what: str
    status: int = 0


def report(overrides: Sequence[str], *, config_dir: str = "") -> int:
    """Print the findings, a line each, and return the exit status."""
    config, found = _settings(overrides, config_dir)
    findings = [*examine(config, of_run=bool(overrides)), *found]
    for finding in findings:
        print(public(f"{finding.mark:5} {finding.about}: {finding.what}", overrides))
    statuses = {finding.status for finding in findings if finding.mark == WRONG}
    print(f"{sum(finding.mark == WRONG for finding in findings)} wrong, {len(findings)} looked at")
    return REFUSED if REFUSED in statuses else max(statuses, default=0)


def examine(config: Any, *, of_run: bool) -> Iterator[Finding]:
    """Try everything. `config`: the run's settings, None if they cannot be read; `of_run`: whether they name a run."""
    device_type = default_device_type()
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", versions),
        ("devices", devices),
        ("attention", lambda: attention(config, device_type)),
        ("compiler", lambda: compiler(config, device_type)),
        ("shared memory", shared_memory),
        ("slurm", slurm),
        ("loggers", lambda: loggers(config)),
    ]
    if config is not None:
        checks.append(("run_dir", lambda: run_folder(Path(config.run_dir))))
    if config is not None and of_run:
        checks += [("room", lambda: room(config)), ("shards", lambda: shards(config))]
    for about, check in checks:
        try:
            yield from check()
        except ModuleNotFoundError as error:
            yield Finding(NOTE, about, remedy(error))
        except (ValueError, OSError, RuntimeError) as error:
            yield Finding(WRONG, about, " ".join(words(error).split()), status_of(error))


def public(line: str, given: Sequence[str]) -> str:
    """Return a line without secrets, the user's name and the home folder."""
    line = without_known(redact(line, given), ())
    home = os.path.expanduser("~")  # noqa: PTH111  (a user may have none)
    for name, shown in ((home, "~"), (platform.node(), "HOST")):
        line = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", shown, line) if len(name) > 1 else line
    with contextlib.suppress(OSError, KeyError):  # a container may give the user no name
        line = re.sub(rf"(?<=/){re.escape(getpass.getuser())}(?=/|\b)", "USER", line)
    return line


def _settings(overrides: Sequence[str], config_dir: str) -> tuple[Any, list[Finding]]:
    try:
        from iccld.config import load_config

        return load_config(overrides, config_dir=config_dir), []
    except ModuleNotFoundError as error:
        return None, [Finding(NOTE, "settings", f"a run's settings were not looked at: it {remedy(error)}")]
    except ValueError as error:
        return None, [Finding(WRONG, "settings", str(error), REFUSED)]


def versions() -> Iterator[Finding]:
    """Report the versions of what is installed, and what does not fit the package's requirements."""
    yield Finding(FINE, "iccld", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    try:
        wanted = [Requirement(line) for line in requires("iccld") or []]
    except PackageNotFoundError:
        yield Finding(
            NOTE, "versions", "iccld is not installed, so nothing is known of what it needs; pip install -e ."
        )
        return
    for extra in ("", "train", "slurm", "s3"):
        of_extra = [need for need in wanted if _belongs(need, extra) and need.name != "iccld"]
        have = {need.name: version_of(need.name) for need in of_extra}
        if present := [f"{name} {number}" for name, number in have.items() if number]:
            yield Finding(FINE, f"versions [{extra}]" if extra else "versions", ", ".join(present))
        if missing := [name for name, number in have.items() if not number]:
            install = f"pip install 'iccld[{extra}]'" if extra else "pip install iccld"
            mark = NOTE if extra else WRONG
            yield Finding(mark, f"[{extra}]", f"{', '.join(missing)} not installed; {install} if you need it", REFUSED)
        for need in of_extra:
            if have[need.name] and not need.specifier.contains(have[need.name], prereleases=True):
                what = (
                    f"{need.name} {have[need.name]} must be {need.specifier}; pip install '{need.name}{need.specifier}'"
                )
                yield Finding(WRONG, "versions", what, REFUSED)


def _belongs(need: Requirement, extra: str) -> bool:
    """Tell whether a requirement is the extra's own, or, for an empty name, one of every install."""
    always = need.marker is None or need.marker.evaluate({"extra": ""})
    return always if not extra else not always and need.marker is not None and need.marker.evaluate({"extra": extra})


def devices() -> Iterator[Finding]:
    """Check that the CPU and every GPU compute what they should."""
    yield _of_device("cpu", f"{usable_cpus()} cores for this process, {torch.get_num_threads()} threads in torch")
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(number)
        yield _of_device(f"cuda:{number}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return
    build = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
    remedy_of_build = "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, or install the build for the driver"
    what = (
        f"{build}, but finds no GPU; {remedy_of_build}"
        if build
        else "torch is built without CUDA; install the CUDA build"
    )
    yield Finding(WRONG, "devices", f"there is a driver (nvidia-smi), and {what}", REFUSED)


def _of_device(name: str, what: str) -> Finding:
    try:
        check_device(torch.device(name))
    except (ValueError, RuntimeError) as error:
        return Finding(WRONG, name, f"{what}: {' '.join(str(error).split())}; use another device or machine", AGAIN)
    return Finding(FINE, name, f"{what}; a product of matrices is right")


def attention(config: Any, device_type: str) -> Iterator[Finding]:
    """Report each back end, with the reason if it is off; that is wrong only if the settings choose it."""
    for backend in AttentionBackend:
        try:
            check_backend(backend, device_type)
        except ValueError as error:
            chosen = config is not None and config.model.denoiser.attention is backend
            yield Finding(WRONG if chosen else NOTE, "attention", f"{backend.value} is off: {error}", REFUSED)
        else:
            yield Finding(FINE, "attention", f"{backend.value} works on {device_type}")


def compiler(config: Any, device_type: str) -> Iterator[Finding]:
    """Look for what torch.compile needs: a compiler, and on a GPU Triton."""
    from iccld.runtime.engine.compilation import lacks_for_compiling

    if not (lacks := lacks_for_compiling(device_type)):
        yield Finding(FINE, "compiler", "all is there that torch.compile needs")
        return
    chosen = config is not None and config.engine.compile.value not in ("none", "auto")
    what = f"torch.compile cannot work: {lacks}; or set engine.compile=none"
    yield Finding(WRONG if chosen else NOTE, "compiler", what, REFUSED)


def shared_memory() -> Iterator[Finding]:
    """Check /dev/shm, in which loader workers share their batches."""
    check_shared_memory(SHARED_MEMORY_BYTES)
    yield Finding(FINE, "shared memory", f"/dev/shm gives {SHARED_MEMORY_BYTES >> 20} MiB")


def run_folder(run_dir: Path) -> Iterator[Finding]:
    """Check that files can be renamed and locked where the run will write, and measure how fast the disk is."""
    near = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".iccld_doctor_", dir=near) as folder:
        probe, began = Path(folder) / "probe", time.perf_counter()
        for number in range(5):
            write_whole(probe, f"{number}")
        each_s = (time.perf_counter() - began) / 5
        if probe.read_text() != "4":
            raise ValueError(f"{near} does not show what was written last; use another run_dir.")
        yield Finding(FINE, "run_dir", f"{near}: a file replaces another by a rename")
        slow = f"; over {SLOW_S:g} s is slow: save less often (trainer.checkpoint.save_every) or use another run_dir"
        speed = f"{near}: a small file is on the disk after {1000 * each_s:.1f} ms"
        yield Finding(NOTE if each_s > SLOW_S else FINE, "run_dir", speed + (slow if each_s > SLOW_S else ""))
        yield _locks(Path(folder) / "lock", near)


def _locks(path: Path, near: Path) -> Finding:
    first, second = open_lock(path), open_lock(path)
    try:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Finding(FINE, "run_dir", f"{near}: a lock keeps others out")
    except OSError as error:
        what = f"{near}: no locks ({error.strerror}); two jobs are told apart by beats in the lock file, in 20 s"
        return Finding(NOTE, "run_dir", what)
    finally:
        os.close(first)
        os.close(second)
    what = f"{near}: a lock keeps nobody out; never start two jobs with one run_dir there, or use another folder"
    return Finding(WRONG, "run_dir", what, REFUSED)


def room(config: Any) -> Iterator[Finding]:
    """Check that the checkpoints of all stages have room: fp32 weights, averages and two moments, at most."""
    from iccld.models.iccld import ICCLD
    from iccld.runtime.faults.preflight import check_space

    if config.model.encoder.pretrained:
        yield Finding(NOTE, "room", "not known before the pretrained encoder is there; train looks at its start")
        return
    with torch.device("meta"):
        model = ICCLD(config=config.model, num_classes=config.data.class_set.build().num_classes)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    needed, largest, kept = 0, 0, 0
    for settings in (getattr(config, name) for name in config.stages):
        size = 4 * num_parameters * (4 + len(settings.objective.ema_profile.widths))
        count = settings.trainer.checkpoint.keep + 1
        needed, largest, kept = needed + size * count, max(largest, size), kept + count
    check_space(Path(config.run_dir), needed)
    yield Finding(FINE, "room", f"for {kept} checkpoints of at most {largest / 2**30:.2f} GiB each")


def shards(config: Any) -> Iterator[Finding]:
    """Check that the first and the last sample of every set can be read."""
    from iccld.programs.train.fitness import read_shards

    named = [role for role in ("source", "target", "validation") if getattr(config.data, role).shards]
    if not named:
        yield Finding(NOTE, "shards", "no set is named; give data.source.shards=FOLDER, or an experiment")
        return
    read_shards(config)
    yield Finding(FINE, "shards", f"the first and the last sample of {', '.join(named)} can be read")


def loggers(config: Any) -> Iterator[Finding]:
    """Say which loggers get the metrics beside metrics.jsonl."""
    names = [logger.name for logger in config.metrics.loggers] if config is not None else ["wandb"]
    if "tensorboard" in names:
        yield _tensorboard()
    mode = config.metrics.wandb.value if config is not None else "offline"
    if "wandb" not in names:
        return
    if not find_spec("wandb"):
        yield Finding(NOTE, "loggers", "wandb is not installed; pip install 'iccld[train]', or metrics.wandb=disabled")
        return
    netrc = Path(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))  # noqa: PTH111
    known = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(errors="replace"))
    if mode == "online" and not known:
        yield Finding(NOTE, "loggers", "wandb has no login and will go on offline; `wandb login`, or WANDB_API_KEY")
    else:
        yield Finding(FINE, "loggers", f"wandb {version_of('wandb')}, {mode}")


def _tensorboard() -> Finding:
    if not find_spec("tensorboard"):
        return Finding(NOTE, "loggers", "tensorboard is not installed; pip install 'iccld[tensorboard]'")
    return Finding(FINE, "loggers", f"tensorboard {version_of('tensorboard')}")


def slurm() -> Iterator[Finding]:
    """Check that jobs can be submitted from here."""
    if not (sbatch := shutil.which("sbatch")):
        yield Finding(NOTE, "slurm", "sbatch is not on PATH; iccld submit needs a login node of a cluster")
        return
    try:
        done = subprocess.run([sbatch, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding(NOTE, "slurm", f"sbatch does not run ({error}); iccld submit needs a login node of a cluster")
        return
    inside = ", and this is a job" if os.environ.get("SLURM_JOB_ID") else ""
    if done.returncode:
        said = " ".join(done.stderr.split())[:200]
        yield Finding(NOTE, "slurm", f"sbatch fails ({said}); iccld submit needs a login node of a cluster")
    else:
        yield Finding(FINE, "slurm", f"{done.stdout.strip()}{inside}")
