"""Plain YAML: what is written comes back, and nothing in a file leads elsewhere."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.plain_yaml import MAX_BYTES, parse_yaml, read_yaml, to_yaml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WORDS = st.sampled_from(["1e3", "1_000", "2024-01-05", "1:30", "on", "null", "~", ".inf", "0o7", "=", "<<", "a: b", ""])
LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT, WORDS)
KEY = st.one_of(TEXT, st.integers(), WORDS)
VALUES = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEY, inner, max_size=4))


@settings(deadline=None, max_examples=300)
@given(VALUES)
def test_what_is_written_comes_back(values: Any):
    assert parse_yaml(to_yaml(values), where="x") == values


def test_the_same_list_twice_is_written_twice():
    shared = [1]
    assert parse_yaml(to_yaml({"a": shared, "b": shared}), where="x") == {"a": [1], "b": [1]}


def test_a_number_without_a_point_is_one():
    assert parse_yaml("a: 1e-7\nb: 1e5\nc: -.5e3", where="x") == {"a": 1e-7, "b": 1e5, "c": -500.0}
    assert math.isinf(parse_yaml(".inf", where="x"))


@pytest.mark.parametrize("text", ["4:00:00", "1:30", "-1:30.5", "1" + ":59" * 100_000, "1" + ":59" * 100_000 + ".5"])
def test_what_yaml_takes_for_a_number_of_base_60_is_text_at_once(text: str):
    begin = time.monotonic()
    assert parse_yaml(f"a: {text}", where="x") == {"a": text}
    assert time.monotonic() - begin < 2


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "x:2: has an alias"),
        ("a: 1\nb: !!python/object/apply:os.system [id]", "x:2: has a tag"),
        ("a: !!binary aGk=", "x:1: has a tag"),
        ("a: !x 1", "x:1: has a tag"),
        ("a: 1\na: 2", "x:2: names 'a' twice"),
        ("[" * 100_000, "x:1: is nested"),
        ("a: " + "1" * 5000, "x: no YAML"),
        ("a: !!bool maybe", "x: no YAML that can be read ('maybe')"),
        ("a: !!int ''", "x: no YAML"),
        ("a: !!float ''", "x: no YAML"),
        ("a: !!int " + "1" + ":59" * 100_000, "x:1: has a number of base 60"),
        ("a: !!float " + "1" + ":59" * 100_000, "x:1: has a number of base 60"),
        ("a: 1\n--- \nb: 2", "x:2: "),
        ("a: \x07", "x: "),
        ("? [a]\n: 1", "x:1: "),
        ("a\tb: {", "x:1: "),
    ],
)
def test_what_is_not_plain_is_one_line_at_once(text: str, message: str):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r".*") as raised:
        parse_yaml(text, where="x")
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value), str(raised.value)
    assert time.monotonic() - begin < 2


def nested(depth: int, count: int) -> str:
    """A list in a list, and so on, each with `count` aliases of the next one, as in &a1 [&a0 [x], *a0, *a0]."""
    text = "x"
    for level in range(depth):
        text = f"&a{level} [{','.join([text, *[f'*a{level - 1}'] * (count if level else 0)])}]"
    return text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "x:6: has aliases that stand for over 100,000 values."),
        (nested(9, 9), "x:1: has aliases that stand for over 100,000 values."),
        (f"a: &a {'x' * 10**6}\nb: [{','.join(['*a'] * 20)}]", "x:2: has aliases that stand for over"),
        ("a: &a [1, {b: *a}]", "x:1: has aliases that stand for over"),
        ("a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 99)), "x:39: is nested over 40 deep"),
        ("a: *b", "x:1: found undefined alias 'b'."),
    ],
)
def test_aliases_of_a_file_of_ones_own_unfold_to_few_values(text: str, message: str):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r".*") as raised:
        parse_yaml(text, where="x", aliases=True)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value), str(raised.value)
    assert time.monotonic() - begin < 2


def test_as_many_aliases_as_are_allowed_are_read():
    text = "a: &a [1,1,1,1]\nb: [" + ",".join(["*a"] * 20_000) + "]"
    assert parse_yaml(text, where="x", aliases=True)["b"] == [[1] * 4] * 20_000
    with pytest.raises(ValueError, match="x:2: has aliases that stand for over 100,000 values"):
        parse_yaml(f"{text[:-1]},*a]", where="x", aliases=True)
    assert parse_yaml(nested(4, 9), where="x", aliases=True)


def test_a_file_that_is_none_or_too_large_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a plain file"):
        read_yaml(tmp_path)
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match="has more than"):
        read_yaml(tmp_path / "large.yaml")
