"""A model folder from a stranger: nothing of its card is built, fetched or shown before it is known to be a model's."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from iccld.cli import main
from iccld.durable import file_checksum
from iccld.models.iccld import ICCLD
from tests.models.factory import trained_model

NAMES = ["road", "sky", "car", "pole", "person"]
PALETTE = [(i, i, i) for i in range(5)]
Card = dict[str, Any]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    trained_model().save_pretrained(folder, class_names=NAMES, palette=PALETTE)
    return folder


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    for path in model_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(folder: Path, change: Callable[[Card], Any]) -> None:
    card = json.loads((folder / "config.json").read_text())
    change(card)
    (folder / "config.json").write_text(json.dumps(card))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=r".*") as raised:
        ICCLD.from_pretrained(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def backbone(card: Card) -> Card:
    return card["model"]["encoder"]["backbone_config"]


HUGE = {
    "depths": lambda c: backbone(c).update(depths=[10**9, 1, 1, 1]),
    "some depths": lambda c: backbone(c).update(depths=[100, 100, 100, 100]),
    "many depths": lambda c: backbone(c).update(depths=[1] * 1000),
    "hidden": lambda c: backbone(c).update(hidden_sizes=[10**9] * 4),
    "wide": lambda c: backbone(c).update(hidden_sizes=[100_000] * 4),
    "layers": lambda c: backbone(c).update(model_type="dinov2", num_hidden_layers=10**9),
    "float": lambda c: backbone(c).update(model_type="mobilenet_v2", depth_multiplier=1e300),
    "repeats": lambda c: backbone(c).update(model_type="efficientnet", num_block_repeats=[100_000] * 7),
    "factor": lambda c: backbone(c).update(model_type="efficientnet", depth_coefficient=100_000.0),
    "infinite": lambda c: backbone(c).update(mlp_ratios=[float("inf")] * 4),
    "digits": lambda c: backbone(c).update(num_channels=10**4000),
    "latent": lambda c: c["model"].update(latent_channels=10**9),
    "wide latent": lambda c: c["model"].update(latent_channels=100_000),
    "decoder": lambda c: c["model"]["decoder"].update(num_blocks=10**6),
    "wide decoder": lambda c: c["model"]["decoder"].update(width=80_000),
    "denoiser": lambda c: c["model"]["denoiser"].update(channel_multipliers=[1] * 10_000),
    "wide denoiser": lambda c: c["model"]["denoiser"].update(width=80_000, head_dim=80_000),
    "discriminator": lambda c: c["model"]["discriminator"].update(num_layers=10**9),
}


PROGRAM = """
import resource, sys, time
from iccld.models.iccld import ICCLD
from tests.models.factory import trained_model
trained_model()
for folder in sys.argv[1:]:
    peak, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        ICCLD.from_pretrained(folder)
    except ValueError as error:
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        print(str(error).count(chr(10)), time.process_time() - begin, more / 1024, len(str(error)))
"""


def test_what_no_model_has_is_refused_at_once_and_before_memory_is_taken(model_folder: Path, tmp_path: Path):
    folders = []
    for name, change in HUGE.items():
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        for path in model_folder.iterdir():
            (folders[-1] / path.name).write_bytes(path.read_bytes())
        edit(folders[-1], change)
    command = [sys.executable, "-c", PROGRAM, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400)
    said = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(said) == len(HUGE)
    for name, (lines, seconds, mebibytes, length) in zip(HUGE, said, strict=True):
        assert lines == 0 and seconds < 2 and mebibytes < 200 and length < 600, (name, seconds, mebibytes, length)


@pytest.mark.parametrize("value", ["x" * 100_000, list(range(30_000)), {"a" * 50_000: 1}])
@pytest.mark.parametrize("name", ["stage", "class_names", "origin", "model", "weights_sha256", "format_version"])
def test_a_message_shows_the_beginning_of_a_long_value(folder: Path, name: str, value: Any):
    if name in ("model", "origin") and isinstance(value, dict):
        return
    edit(folder, lambda card: card.update({name: value}))
    assert len(refusal(folder)) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["encoder"].update(pretrained="evil/model"), "names an encoder, 'evil/model'"),
        (lambda c: c["model"]["encoder"].update(pretrained="../../elsewhere", backbone_config={}), "names an encoder"),
        (lambda c: backbone(c).update(auto_map={"AutoModel": "evil/model--x.X"}), "auto_map, which could fetch code"),
        (lambda c: backbone(c).update(_attn_implementation="evil/kernel"), "_attn_implementation, which could"),
        (lambda c: backbone(c).update(attn_implementation="evil/kernel"), "attn_implementation, which could"),
        (lambda c: backbone(c).update(quantization_config={"a": 1}), "quantization_config, which could"),
        (lambda c: backbone(c).update(hidden_sizes=[8]), "describes no model that can be built (IndexError"),
        (lambda c: backbone(c).update(model_type="timm_backbone"), "'timm_backbone' could not be loaded again"),
        (lambda c: backbone(c).update(model_type="detr"), "'detr' could not be loaded again"),
        (lambda c: backbone(c).update(model_type="../x"), "is no transformers config"),
        (lambda c: c.update(class_names=["\x1b[2Jroad", *NAMES[1:]]), "plain names"),
        (lambda c: c.update(class_names=["a\nb", *NAMES[1:]]), "plain names"),
        (lambda c: c.update(class_names=["\u202eroad", *NAMES[1:]]), "plain names"),
        (lambda c: c.update(class_names=["x" * 101, *NAMES[1:]]), "plain names"),
        (lambda c: c.update(class_names=NAMES * 60, palette=[[0, 0, 0]] * 300), "at most 255"),
        (lambda c: c.update(class_names=[1, *NAMES[1:]]), r"class_names[0]=1 must be of type str"),
        (lambda c: c.update(palette=[[0, 0, 256]] * 5), "from 0 to 255"),
        (lambda c: c.update(palette=[["0", 0, 0]] * 5), "must be of type int"),
        (lambda c: c.update(palette=["abc"] * 5), "must be of type list"),
        (lambda c: c["model"]["encoder"].update(image_mean=["a", 0, 0]), "must be of type float"),
        (lambda c: c.update(weights_sha256="0" * 64), "its checksum differs"),
        (lambda c: c.update(weights_sha256=""), "format 2 has the SHA-256"),
        (lambda c: c.pop("weights_sha256"), "format 2 has the SHA-256"),
        (lambda c: c.update(weights_sha256="../x"), "format 2 has the SHA-256"),
        (lambda c: c.update(format_version=1), "format 1 has none"),
    ],
)
def test_a_strange_card_is_one_line(change: Callable[[Card], Any], message: str, folder: Path):
    edit(folder, change)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": 1, "a": 2}',
        "1" * 10_000,
        '{"a": "' + "x" * (5 << 20) + '"}',
        "\xff",
        '{"format_version": [2]}',
    ],
)
def test_a_strange_file_is_one_line(text: str, folder: Path):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    begin = time.monotonic()
    assert str(folder) in refusal(folder) and time.monotonic() - begin < 5


def test_weights_that_were_changed_are_not_used(folder: Path):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "its checksum differs" in refusal(folder)


def test_a_header_that_is_said_to_be_huge_is_not_read(folder: Path):
    (folder / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    assert "header has 1099511627776 bytes" in refusal(folder)


def test_names_of_weights_are_no_commands_of_the_terminal(folder: Path, capfd: pytest.CaptureFixture[str]):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "\x1b]0;owned\x07": next(iter(weights.values())).clone()}, folder / "model.safetensors")
    edit(folder, lambda c: c.update(weights_sha256=file_checksum(folder / "model.safetensors")))
    Image.new("RGB", (64, 64)).save(image := folder.parent / "x.png")
    assert main(["predict", str(folder), str(image), str(folder / "out")]) == 2
    assert "\x1b" not in (said := capfd.readouterr().err) and "\\x1b]0;owned" in said


def test_a_card_of_the_first_format_is_read_with_a_word(folder: Path, caplog: pytest.LogCaptureFixture):
    edit(folder, lambda c: (c.pop("weights_sha256"), c.update(format_version=1)))
    with caplog.at_level(logging.WARNING):
        ICCLD.from_pretrained(folder)
    assert "without a checksum" in caplog.text
