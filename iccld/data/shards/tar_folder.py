"""Content of a folder of tars: the tars, and everything else, which is counted or named."""

import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from iccld.data.shards.tally import Tally, plain
from iccld.data.shards.tars import LEAVE_OUT, Problem
from iccld.data.shards.work_folder import MAKING_FOLDER
from iccld.data.storage.files import kind_of, open_file, packed_by
from iccld.data.storage.index import INDEX_FOLDER

INDEXING_FOLDER = "indexing"
_OURS = re.compile(rf"{INDEX_FOLDER}((\.[0-9a-f]{{8}})?\.tmp)?|{INDEXING_FOLDER}|{MAKING_FOLDER}")
_PACKED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|zstd|lz4|lzma|lz|z|br|sz|gpg)|tgz|taz|tbz2?|tb2|txz|tlz|tzst)$", re.I)
_HALF_MADE = re.compile(r"\.tar.*\.(tmp|temp|part|partial|crdownload|download|incomplete|filepart|aria2)$", re.I)
_ARCHIVE = re.compile(r"\.(zip|7z|rar)$", re.I)
_MAX_TARS = 10
_LINK = "a link to a folder elsewhere, which is not entered: shards lie in one folder"
_MOVE = f"move it away, {LEAVE_OUT}"


@dataclass
class TarFolder:
    """Tars of a folder, sorted; other entries that may hold samples; the rest; and our commands' work folders."""

    tars: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    passed_over: Tally = field(default_factory=Tally)
    unfinished: list[Path] = field(default_factory=list)


def look_into(folder: Path) -> TarFolder:
    """Sort all that lies in a folder, without our own index and work folders. Raises OSError."""
    found = TarFolder()
    for path in sorted(folder.iterdir()):
        if _OURS.fullmatch(path.name):
            found.unfinished += [path] if path.name != INDEX_FOLDER else []
            continue
        kind = kind_of(path)
        what, remedy = _fault(path, kind)
        if what:
            found.problems.append(Problem(str(path), what, remedy))
        elif kind == "a file" and _is_tar_name(path.name):
            found.tars.append(path)
        elif path.name.startswith("."):
            found.passed_over.add("hidden files or folders passed over", path.name)
        else:
            found.passed_over.add(f"other {'folders' if kind == 'a folder' else 'files'} passed over", path.name)
    return found


def _is_tar_name(name: str) -> bool:
    return name.lower().endswith(".tar") and not name.startswith(".")


def _fault(path: Path, kind: str) -> tuple[str, str]:
    """Say why an entry that may hold samples cannot be used, and what to do; "" for a tar and for what holds none."""
    if kind == "a folder":
        return _fault_of_folder(path)
    if kind != "a file":
        return (f"it is {kind}, no file", _MOVE) if _is_tar_name(path.name) or kind == "a link to nothing" else ("", "")
    if _is_tar_name(path.name):
        unsound = not path.name.isprintable()
        return ("its name has control characters or is not UTF-8", f"rename it, {LEAVE_OUT}") if unsound else ("", "")
    try:
        content, command = _content(path)
    except OSError as error:
        return f"it cannot be looked at ({error.strerror})", _MOVE
    if content == "tar":
        return "it is a tar, but its name does not end in .tar (half-made, or renamed?)", f"rename it, {_MOVE}"
    if _PACKED_TAR.search(path.name) or _ARCHIVE.search(path.name):
        packer = content or "its name's ending"
        what = f"it is packed (by {packer}); shards must be plain tars, in which every sample has an address"
        return what, f"unpack it{f' ({command})' if command else ''}, {_MOVE}"
    return ("it is half-made, by its name", f"finish it, {_MOVE}") if _HALF_MADE.search(path.name) else ("", "")


def _content(path: Path) -> tuple[str, str]:
    """Return what a file holds by its first bytes ("tar", "gzip", ...), and the command that unpacks it."""
    with open_file(path) as file:
        head = file.read(tarfile.BLOCKSIZE)
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return packed_by(head)
    return "tar", ""


def _fault_of_folder(path: Path) -> tuple[str, str]:
    if _is_tar_name(path.name):
        return "it is a folder, no file", _MOVE
    if (path / INDEX_FOLDER).is_dir() or path.name.startswith("."):
        return "", ""
    if path.is_symlink():
        return ("", "") if _leads_into(path, path.parent) else (f"it is {_LINK}", _MOVE)
    tars, links = _tars_below(path)
    if tars:
        more = " or more" if len(tars) >= _MAX_TARS else ""
        what = (
            f"it holds {len(tars)}{more} tars, such as {plain(tars[0])}, which are not read: shards lie in one folder"
        )
        return what, f"move them up, or index that folder by itself, {LEAVE_OUT}"
    return (f"in it, {plain(links[0])} is {_LINK}", _MOVE) if links else ("", "")


def _tars_below(folder: Path) -> tuple[list[str], list[str]]:
    """Return the first tars in a folder's sub-folders, and links to folders elsewhere, which are not entered."""
    tars, links = list[str](), list[str]()
    for parent, folders, files in os.walk(folder):
        folders.sort()
        links += [path for name in folders if not _leads_into(Path(path := f"{parent}/{name}"), folder.parent)]
        tars += [f"{parent}/{name}" for name in sorted(files) if _is_tar_name(name) or _PACKED_TAR.search(name)]
        if len(tars) >= _MAX_TARS:
            break
    return tars[:_MAX_TARS], links


def _leads_into(path: Path, folder: Path) -> bool:
    """Tell whether a path is no link, or a link to a folder that is entered anyway."""
    if not path.is_symlink():
        return True
    target, folder = path.resolve(), folder.resolve()
    return target.is_relative_to(folder) and "/." not in f"/{target.relative_to(folder)}/".replace("/./", "/")
