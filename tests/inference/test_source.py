"""Models from the hub, and to it: a local server speaks the hub's end points."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from iccld.inference.source import MODEL_FILES
from tests.inference.hub import Hub, serving
from tests.inference.test_model import save
from tests.models.factory import trained_model

SCRIPT = """
import sys
from iccld import ICCLD
for source in sys.argv[1:]:
    try:
        model = ICCLD.from_pretrained(source)
        print(model.card.class_names[0])
        if "/" == source[0]:
            model.push_to_hub("me/model", token="hf_none")
    except ValueError as error:
        print(error)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(trained_model(), tmp_path_factory.mktemp("model"))


def run(sources: list[str], hub: Hub, home: Path, **more: str) -> list[str]:
    """A line for each source. A process of its own, since huggingface_hub reads its end point when it is imported."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[2]), **more}
    words = [sys.executable, "-c", SCRIPT, *sources]
    done = subprocess.run(words, env=environment, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_model_goes_to_the_hub_with_its_card_and_comes_back_checked(folder: Path, hub: Hub, tmp_path: Path):
    hub.files["me/model/evil.py"] = b"raise SystemExit(1)"
    for name in ("config.json", "model.safetensors"):
        hub.files |= {f"me/{repository}/{name}": (folder / name).read_bytes() for repository in ("large", "changed")}
    hub.files["me/bare/config.json"] = b"{}"
    hub.sizes["me/large/config.json"] = 1 << 40
    hub.files["me/changed/model.safetensors"] = hub.files["me/changed/model.safetensors"][:-1] + b"!"
    sources = [str(folder), "me/model", "me/bare", "me/large", "me/changed", "me/missing"]
    local, fetched, bare, large, changed, missing = run(sources, hub, tmp_path)
    readme = hub.files["me/model/README.md"]
    assert b"renderings" in readme and b"license: unknown" in readme and b"| 2 | cart |" in readme
    assert local == fetched == "kerb"
    assert {name for name in hub.asked if "changed" not in name} == {f"me/model/{name}" for name in MODEL_FILES}
    assert "has no model.safetensors; it is no model" in bare
    assert "config.json has 1,099,511,627,776 bytes" in large
    assert "its checksum differs" in changed
    assert missing.startswith("me/missing is no folder here, and could not be had from the hub http://127.0.0.1")
    assert f"if a folder is meant, check its path from {tmp_path}; if a model of the hub, the spelling" in missing
    card = hub.files["me/model/config.json"]
    assert b"/private" not in card and json.loads(card)["origin"]["run_dir"] == "street"
    hub.asked.clear()
    offline, kept = run(["runs/typo", "me/model"], hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.startswith("runs/typo is no folder here, and") and "if a folder is meant" in offline
    assert kept == "kerb" and not hub.asked, "from its copy"
