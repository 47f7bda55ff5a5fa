"""Options and schemes of the storage, by which opening a set writes files, count only if the user has typed them."""

from pathlib import Path

import pytest

from iccld.config import load_config
from iccld.programs.ablate.grid import parse_grid
from iccld.programs.ablate.rows import open_ablation

OPTIONS = "{path: /victim, mode: w}"
FILES = {
    "experiment/a.yaml": f"data: {{storage: {{options: {OPTIONS}}}}}",
    "experiment/b.yaml": "data: {storage: {allow_schemes: [zip]}}",
    "experiment/c.yaml": "defaults: [a]",
    "experiment/d.yaml": f"x: {OPTIONS}\ndata: {{storage: {{options: '${{x}}'}}}}",
    "experiment/e.yaml": "data: {storage: '${data.cache.x}'}",
    "part/f.yaml": f"options: {OPTIONS}",
    "data/g.yaml": f"storage: {{options: {OPTIONS}}}",
}
REFUSED = (
    r"^data\.storage\.(options|allow_schemes), of which a file sets (path|path, mode|mode|zip), counts only[^\n]*$"
)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# @package _global_\n{text}\n" if "experiment" in name else f"{text}\n")
    return str(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=a"],
        ["experiment=b"],
        ["experiment=c"],
        ["+part@data.storage=f"],
        ["+data=g"],
        ["experiment=a", "data.storage.options={path:/mine}"],
        ["experiment=a", "data={storage:{options:{mode:w}}}"],
    ],
)
def test_a_file_sets_none(words: list[str], folder: str) -> None:
    with pytest.raises(ValueError, match=REFUSED) as raised:
        load_config(words, config_dir=folder)
    assert "/victim" not in str(raised.value)


@pytest.mark.parametrize("name", ["d", "e"])
def test_a_file_sets_none_by_another_setting(name: str, folder: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$"):
        load_config([f"experiment={name}"], config_dir=folder)


@pytest.mark.parametrize(
    "words",
    [
        ["+data.storage.options={path:/victim,mode:w}", "data.storage.allow_schemes=[zip]"],
        [
            "++data.storage.options.path=/victim",
            "++data.storage.options.mode=w",
            "data={storage:{allow_schemes:[zip]}}",
        ],
        ["+data.storage={options:{path:/victim,mode:w},allow_schemes:[zip],timeout_s:3.0}"],
    ],
)
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_what_is_typed_too_is_good(words: list[str], name: str, folder: str) -> None:
    storage = load_config([f"experiment={name}", *words], config_dir=folder).data.storage
    assert storage.options == {"path": "/victim", "mode": "w"} and storage.allow_schemes == ["zip"]


@pytest.mark.parametrize(
    "word",
    [
        "data.storage.allow_schemes=[zip]",
        "++data.storage.allow_schemes=[zip]",
        "++data.storage={timeout_s: 3.0, retry_for_s: 0.0, allow_schemes: [zip]}",
        "data={storage:{allow_schemes:[zip]}}",
    ],
)
def test_a_grid_sets_none(word: str, tmp_path: Path) -> None:
    grid = parse_grid(
        {"baseline": "a", "seeds": [0], "common": ["model=tiny", word], "runs": {"a": {}}}, where="grid.yaml"
    )
    with pytest.raises(ValueError, match=r"^runs\.a: data\.storage\.allow_schemes, of which a file sets zip"):
        open_ablation(grid, tmp_path, num_ranks=1)
