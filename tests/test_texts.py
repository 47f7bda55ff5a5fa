import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.texts import read_text

ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16": b"",
    "utf-32": b"",
    "utf-16-be": b"\xfe\xff",
    "utf-32-be": b"\0\0\xfe\xff",
}
LETTERS = st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r\n\ufeff")


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.text(LETTERS), max_size=4),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(list(ENCODINGS)),
)
def test_texts_are_read_whatever_their_mark_and_line_ends(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str, encoding: str
) -> None:
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_bytes(ENCODINGS[encoding] + end.join(lines).encode(encoding))
    assert read_text(path, "keys") == "\n".join(lines)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\nStraße".encode("latin-1"), "keys=a.txt: line 2 is no UTF-8 (Latin-1 or Windows-1252?); save it as UTF-8."),
        ("Straße".encode("utf-16-le"), "keys=a.txt: line 1 is no UTF-8 (UTF-16 without a byte-order mark?); save it"),
        (
            "plain".encode("utf-16-le"),
            "keys=a.txt: it holds zero bytes (UTF-16 without a byte-order mark?); save it as",
        ),
        (b"\xff\xfea", "keys=a.txt: it is broken UTF-16; save it as UTF-8."),
        (None, "keys=a.txt: there is no such file"),
    ],
)
def test_other_encodings_are_one_line_that_names_them(tmp_path: Path, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_text(tmp_path / "a.txt", "keys=a.txt")
    assert "\n" not in str(error.value)


def test_what_a_user_wrote_is_read_here_alone() -> None:
    """Wherever else a text is read, it is one that we, or the system, wrote."""
    ours = {
        "node.py",  # the kernel's
        "texts.py",
        "runtime",
        "programs",
        "slurm/history.py",
        "models/model_card.py",
        "demo/scenes/export.py",
        "data/shards/making.py",
    }
    root = Path(__file__).parents[1] / "iccld"
    readers = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if ".read_text(" in path.read_text()}
    assert [path for path in readers if not {path, path.split("/")[0]} & ours] == []
