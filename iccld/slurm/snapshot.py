"""Copy of the code at a job's submission: later edits change no job that waits."""

import errno
import hashlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from iccld.durable import (
    holds_only,
    is_plain,
    is_real_folder,
    make_folder,
    refuse_links,
    remove_tree,
    scratch_folder,
    walk,
)

PACKAGE = Path(__file__).resolve().parents[1]
LINK = "accelerate_configs"  # a folder of the package that is a link in a checkout, which rglob does not follow

COMPILED = "__pycache__"

_holds_compiled = holds_only(r"[^/]+\.pyc(\.\d+)?|\.nfs[0-9a-f]+")
_holds_code = holds_only(f"{PACKAGE.name}/.+")

LEFT_OVER_AFTER_S = 86_400.0
EDITED = f"the code in {PACKAGE} was edited while a job was submitted, which must run one state of it; submit again."


def code_files() -> Iterator[tuple[str, Path]]:
    """Yield the path of each file in the copy, and its present path."""
    found = {*PACKAGE.rglob("*"), *(PACKAGE / LINK).rglob("*")}
    for path in sorted(found):
        if path.is_file() and COMPILED not in path.parts:
            yield path.relative_to(PACKAGE.parent).as_posix(), path


def code_hash() -> str:
    """Return a name of this state of the code, made of every file's name and content."""
    digest = hashlib.sha256()
    for name, path in code_files():
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def copy_code(folder: Path) -> Path:
    """Copy the package to `folder`/HASH, once for each state of the code, whole or not at all; return the copy.

    Raises ValueError if something else has that name: a job would run it; or if the code is edited meanwhile.
    """
    target = folder / code_hash()
    refuse_links(target, within=folder)
    if target.is_dir() and any(target.iterdir()):
        _check_copy(target)
    else:
        scratch = scratch_folder(target, is_ours=_is_left_over)
        for name, path in code_files():
            make_folder((scratch / name).parent, within=scratch)
            shutil.copyfile(path, scratch / name)
        if code_hash() != target.name:
            remove_tree(scratch)
            raise ValueError(EDITED)
        try:
            scratch.rename(target)
        except OSError:  # made meanwhile by another submission
            remove_tree(scratch)
            if not target.is_dir():
                raise
            _check_copy(target)
    return target


def _check_copy(copy: Path) -> None:
    """Refuse a copy that holds anything but this package; files that Python compiled are deleted."""
    caches = [path for path in copy.rglob(COMPILED) if is_real_folder(path)]
    if strange := next(_strange(copy, caches), None):
        if code_hash() != copy.name:
            raise ValueError(EDITED)
        raise ValueError(f"{strange} is not of this code, and a job would run it; remove {copy}.")
    for cache in caches:
        try:
            remove_tree(cache)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):  # a job that starts compiles again
                raise


def _strange(copy: Path, caches: Collection[Path]) -> Iterator[Path]:
    """Yield what in a copy is not of this code, or cannot be listed or read."""
    wanted = {copy / name: path for name, path in code_files()}
    known = {*wanted, *caches, *(parent for path in wanted for parent in path.parents)}
    yield from (cache for cache in caches if not _holds_compiled(cache))
    try:
        yield from (path for path in walk(copy) if path not in known and path.parent not in caches)
    except OSError as error:
        yield Path(error.filename)
    yield from (path for path, own in wanted.items() if not _is_copy(path, of=own))


def _is_copy(path: Path, *, of: Path) -> bool:
    """Tell whether it is a file of its own, with the same bytes, that can be read."""
    try:
        same_size = is_plain(path) and path.stat().st_size == of.stat().st_size
        return same_size and path.read_bytes() == of.read_bytes()
    except PermissionError:
        return False


def _is_left_over(scratch: Path) -> bool:
    """Tell whether the copy was abandoned: it is old enough that no submission can still be copying."""
    return _holds_code(scratch) and time.time() - scratch.stat().st_mtime > LEFT_OVER_AFTER_S


def code_version(version: str) -> str:
    """Return version, commit, uncommitted changes, and who submitted from where."""
    return "".join(f"{name}: {value}\n" for name, value in code_facts(version).items())


def code_facts(version: str) -> dict[str, str]:
    """Return what `code_version` tells, by name."""
    changed = _git("status", "--porcelain", "--", "iccld", LINK).splitlines()
    return {
        "iccld": version,
        "code": code_hash(),
        "commit": _git("rev-parse", "HEAD") or "not a git checkout",
        "changed": ", ".join(line[3:] for line in changed) or "nothing",
        "python": sys.version.split()[0],
        "submitted": f"{time.strftime('%F %T')} on {platform.node()}",
    }


def _git(*arguments: str) -> str:
    """Return git's answer about the checkout; "" if the package is installed, or git is missing."""
    if not (PACKAGE.parent / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(PACKAGE.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.rstrip() if done.returncode == 0 else ""
