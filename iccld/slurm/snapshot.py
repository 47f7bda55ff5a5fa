"""The code as it was when a job was submitted: what is edited afterwards changes no job that waits."""

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
LINKED = "accelerate_configs"  # a folder of the package that is a link in a checkout, which rglob does not follow

COMPILED = "__pycache__"

_holds_compiled = holds_only(r"[^/]+\.pyc(\.\d+)?|\.nfs[0-9a-f]+")
_holds_code = holds_only(f"{PACKAGE.name}/.+")

LEFT_OVER_AFTER_S = 86_400.0


def code_files() -> Iterator[tuple[str, Path]]:
    """Where each file lies in the copy, and where it is now."""
    found = {*PACKAGE.rglob("*"), *(PACKAGE / LINKED).rglob("*")}
    for path in sorted(found):
        if path.is_file() and COMPILED not in path.parts:
            yield path.relative_to(PACKAGE.parent).as_posix(), path


def code_hash() -> str:
    """The name of this state of the code, by every file's name and content."""
    digest = hashlib.sha256()
    for name, path in code_files():
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def copy_code(folder: Path) -> Path:
    """`folder`/HASH with the package; made once for each state of the code, whole or not at all.

    Raises ValueError where something else has that name: a job would run it.
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
        try:
            scratch.rename(target)
        except OSError:  # made meanwhile by another submission
            remove_tree(scratch)
            if not target.is_dir():
                raise
            _check_copy(target)
    return target


def _check_copy(copy: Path) -> None:
    """Refuse a copy with anything else than this package; what Python has compiled of it is deleted."""
    caches = [path for path in copy.rglob(COMPILED) if is_real_folder(path)]
    if strange := next(_strange(copy, caches), None):
        raise ValueError(f"{strange} is not of this code, and a job would run it; remove {copy}.")
    for cache in caches:
        try:
            remove_tree(cache)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):  # a job that starts compiles again
                raise


def _strange(copy: Path, caches: Collection[Path]) -> Iterator[Path]:
    """What in a copy is not of this code, or cannot be listed or read."""
    wanted = {copy / name: path for name, path in code_files()}
    known = {*wanted, *caches, *(parent for path in wanted for parent in path.parents)}
    yield from (cache for cache in caches if not _holds_compiled(cache))
    try:
        yield from (path for path in walk(copy) if path not in known and path.parent not in caches)
    except OSError as error:
        yield Path(error.filename)
    yield from (path for path, own in wanted.items() if not _is_copy(path, of=own))


def _is_copy(path: Path, *, of: Path) -> bool:
    """Whether it is a file of its own, with the same bytes, that can be read."""
    try:
        same_size = is_plain(path) and path.stat().st_size == of.stat().st_size
        return same_size and path.read_bytes() == of.read_bytes()
    except PermissionError:
        return False


def _is_left_over(scratch: Path) -> bool:
    """Whether its submission is no more; another one may be copying now."""
    return _holds_code(scratch) and time.time() - scratch.stat().st_mtime > LEFT_OVER_AFTER_S


def code_version(version: str) -> str:
    """Version, commit, what differs from it, and who submitted where."""
    return "".join(f"{name}: {value}\n" for name, value in code_facts(version).items())


def code_facts(version: str) -> dict[str, str]:
    """What `code_version` tells, by name."""
    changed = _git("status", "--porcelain", "--", "iccld", LINKED).splitlines()
    return {
        "iccld": version,
        "code": code_hash(),
        "commit": _git("rev-parse", "HEAD") or "not a git checkout",
        "changed": ", ".join(line[3:] for line in changed) or "nothing",
        "python": sys.version.split()[0],
        "submitted": f"{time.strftime('%F %T')} on {platform.node()}",
    }


def _git(*arguments: str) -> str:
    """What git says of the checkout; "" where the package is installed, or git is not there."""
    if not (PACKAGE.parent / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(PACKAGE.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.rstrip() if done.returncode == 0 else ""
