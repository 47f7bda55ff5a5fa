"""Backbones from a folder or a config: what is loaded, what is reported, what is refused."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from iccld.models import backbone
from iccld.models.backbone import _is_away, make_backbone
from iccld.models.encoder import Encoder
from iccld.models.settings import EncoderConfig
from tests.models.factory import BACKBONES, make_encoder, random_images

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


@every_backbone
def test_a_folder_gives_its_weights(backbone: str, tmp_path: Path):
    first = make_encoder(backbone)
    first.backbone.save_pretrained(tmp_path)
    torch.manual_seed(1)
    second = Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)
    assert second.backbone.dtype == torch.float32
    for name, tensor in first.backbone.state_dict().items():
        assert torch.equal(tensor, second.backbone.state_dict()[name]), name
    images = random_images(1, 3, 64, 64)
    for a, b in zip(first(images).features, second(images).features, strict=True):
        assert torch.equal(a, b)


SMALL_CVT = {
    "model_type": "cvt", "embed_dim": [8, 16, 24], "num_heads": [1, 1, 1], "depth": [1, 2, 3],
    "drop_path_rate": [0.5, 0.5, 0.5], "drop_rate": [0.5, 0.5, 0.5],
}  # fmt: skip
GLPN = {"model_type": "glpn", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1] * 4}


def test_a_further_type_can_be_chosen_and_draws_nothing(tmp_path: Path):
    first = Encoder(config=EncoderConfig(backbone_config=SMALL_CVT, width=16), latent_channels=4)
    first.backbone.save_pretrained(tmp_path)
    second = Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)
    before = torch.get_rng_state()
    images = torch.full((1, 3, 64, 64), 0.5)
    for a, b in zip(first(images).features, second(images).features, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_type_of_which_no_saved_model_can_be_rebuilt_is_refused_before_it_is_trained(tmp_path: Path):
    values = {key: value for key, value in GLPN.items() if key != "model_type"}
    AutoModel.from_config(AutoConfig.for_model("glpn", **values)).save_pretrained(tmp_path)
    for config in (EncoderConfig(backbone_config=GLPN), EncoderConfig(pretrained=str(tmp_path))):
        with pytest.raises(ValueError, match=r"type 'glpn' could not be loaded again; use one of .*segformer"):
            Encoder(config=config, latent_channels=4)


def test_a_type_that_is_none_of_ours_after_all_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backbone, "SELF_CONTAINED", {"vit", "hiera", "beit"})
    for kind in sorted(backbone.SELF_CONTAINED):
        config = EncoderConfig(backbone_config={"model_type": kind})
        with pytest.raises(
            ValueError, match=rf"^model\.encoder: a backbone of type '{kind}', .* gives no feature maps"
        ):
            Encoder(config=config, latent_channels=4)


@pytest.mark.parametrize("kind", sorted(backbone.SELF_CONTAINED))
def test_a_misspelt_field_of_a_config_is_refused(kind: str):
    fields = {"model_type": kind, "hiden_sizes": [8, 8, 8, 8], "num_chanels": 3}
    with pytest.raises(ValueError, match=rf"{kind} has no '(hiden_sizes|num_chanels)'"):
        make_backbone("", fields)
    with pytest.raises(ValueError, match="has no 'num_chanels'; did you mean num_channels"):
        make_backbone("", {"model_type": kind, "num_chanels": 3})
    saved = AutoConfig.for_model(kind).to_dict() | {"a_field_of_another_version": 1}
    assert backbone._config_from_dict(saved, where="").model_type == kind


def test_a_folder_that_asks_for_another_normalisation_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_encoder("mobilenet_v2").backbone.save_pretrained(tmp_path)
    config = EncoderConfig(pretrained=str(tmp_path), width=16)
    told = tmp_path / "preprocessor_config.json"
    same = {"image_mean": config.image_mean, "image_std": config.image_std}
    of_bytes = {"do_rescale": False, "image_mean": [123.7, 116.3, 103.5]}
    for text in ("[]", "{", json.dumps(same), json.dumps({"image_mean": None}), json.dumps(of_bytes)):
        told.write_text(text)
        Encoder(config=config, latent_channels=4)
    assert not caplog.text
    for content, other in (
        ({"image_mean": [0.5] * 3}, "[0.5, 0.5, 0.5]"),
        ({"do_normalize": False}, "[0.0, 0.0, 0.0]"),
    ):
        caplog.clear()
        told.write_text(json.dumps(content))
        for _ in range(2):
            Encoder(config=config, latent_channels=4)
        assert caplog.text.count("model.encoder.image_mean=[0.485, 0.456, 0.406], but by") == 1
        assert f"the backbone was trained with {other}; set it" in caplog.text
        assert ("image_std" in caplog.text) == ("do_normalize" in content)


def test_loading_leaves_the_progress_bars_of_transformers_as_they_were(tmp_path: Path):
    make_encoder("mobilenet_v2").backbone.save_pretrained(tmp_path)
    shown = is_progress_bar_enabled()
    try:
        for switch, is_on in ((enable_progress_bar, True), (disable_progress_bar, False)):
            switch()
            Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)
            assert is_progress_bar_enabled() is is_on
    finally:
        (enable_progress_bar if shown else disable_progress_bar)()


def test_half_precision_weights_become_float32(tmp_path: Path):
    make_encoder("mobilenet_v2").backbone.half().save_pretrained(tmp_path)
    encoder = Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["/nowhere/backbone", "no-owner/no-backbone"])
def test_a_missing_backbone_is_named_with_the_remedy(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=rf"model\.encoder\.pretrained='{name}' cannot be loaded(.|\n)*folder with its"
    ):
        Encoder(config=EncoderConfig(pretrained=name), latent_channels=4)


def test_an_empty_folder_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.encoder\.pretrained=.*cannot be loaded"):
        Encoder(config=EncoderConfig(pretrained=str(tmp_path)), latent_channels=4)


def test_weights_that_the_folder_lacks_are_an_error(tmp_path: Path):
    make_encoder().backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(iter(sorted(weights)))
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.encoder\.pretrained=.* lacks 1 of the backbone's weights"):
        Encoder(config=EncoderConfig(pretrained=str(tmp_path)), latent_channels=4)


def test_missing_weights_that_nothing_uses_are_no_error(tmp_path: Path):
    make_encoder("mobilenet_v2").backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "conv_1x1.convolution" not in k}
    assert len(kept) == len(weights) - 1
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)


def test_missing_batch_norm_statistics_are_an_error(tmp_path: Path):
    make_encoder("mobilenet_v2").backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if k != "conv_stem.first_conv.normalization.running_mean"}
    assert len(kept) == len(weights) - 1
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="running_mean"):
        Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)


def test_unexpected_weights_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_encoder().backbone.save_pretrained(tmp_path)
    weights = {**load_file(tmp_path / "model.safetensors"), "stray.weight": torch.zeros(1)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)
    assert "left out weights of ['stray.weight']" in caplog.text


def test_a_config_of_other_sizes_than_its_weights_is_named(tmp_path: Path):
    make_encoder().backbone.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_sizes": [8, 16, 24, 64]}))
    with pytest.raises(ValueError, match=r"model\.encoder\.pretrained=.*cannot be loaded"):
        Encoder(config=EncoderConfig(pretrained=str(tmp_path)), latent_channels=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "dpt", "backbone": "own/other"}, "'dpt' could not be loaded again"),
        ({"backbone": "own/other", "use_pretrained_backbone": True}, "backbone, use_pretrained_backbone, which could"),
        ({"attn_implementation": "own/kernel"}, "attn_implementation, which could fetch code"),
        ({"_attn_implementation": "own/kernel"}, "_attn_implementation, which could fetch code"),
        ({"quantization_config": {"quant_method": "none"}}, "quantization_config, which could fetch code"),
        ({"depths": [100_000_000, 1, 1, 1]}, "must be numbers of at most"),
        ({"depths": [200, 200, 1, 1]}, "must be at most 256 in all"),
        ({"model_type": "bert"}, "'bert' could not be loaded again"),
        ({"model_type": ["segformer"]}, "could not be loaded again"),
        ({"hidden_sizes": "many"}, "is no transformers config"),
    ],
)
def test_a_stranger_s_folder_is_refused_before_anything_is_built_or_asked_for(
    change: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_encoder().backbone.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    monkeypatch.setattr(AutoModel, "from_pretrained", Mock(side_effect=AssertionError("it is built")))
    with pytest.raises(ValueError, match=rf"^model\.encoder\.pretrained=.*{message}"):
        make_backbone(str(tmp_path), {})


def test_what_transformers_notes_in_a_config_is_passed_over(tmp_path: Path):
    make_encoder().backbone.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    noted = {"_name_or_path": "a/b", "_commit_hash": "c", "_attn_implementation_autoset": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, **noted}))
    assert make_backbone(str(tmp_path), {})[0].config.model_type == config["model_type"]


def test_a_folder_whose_config_is_a_pipe_does_not_wait(tmp_path: Path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="not a plain file"):
        make_backbone(str(tmp_path), {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EncoderConfig(), "set exactly one"),
        (EncoderConfig(pretrained="x", backbone_config={"model_type": "segformer"}), "set exactly one"),
        (EncoderConfig(backbone_config={"depths": [1]}), "needs a model_type: one of segformer"),
        (EncoderConfig(backbone_config={"model_type": "nonsense"}), "is no transformers config"),
        (
            EncoderConfig(
                backbone_config={
                    "model_type": "resnet",
                    "hidden_sizes": [8, 8, 8, 8],
                    "embedding_size": 8,
                    "depths": [1, 1, 1, 1],
                }
            ),
            None,
        ),
        (
            EncoderConfig(backbone_config={"model_type": "bert", "hidden_size": 12}),
            "could not be loaded again; use one of",
        ),
    ],
)
def test_backbone_settings_are_checked(config: EncoderConfig, message: str | None):
    if message is None:
        assert len(Encoder(config=config, latent_channels=4).feature_channels) == 4
        return
    with pytest.raises(ValueError, match=message):
        Encoder(config=config, latent_channels=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mean": [0.5]}, r"model\.encoder\.image_mean=\[0\.5\] must be three"),
        ({"image_std": [0.5, 0.5, 0.0]}, r"model\.encoder\.image_std=.*above 0"),
        ({"width": 12}, r"model\.encoder\.width=12 must be a positive multiple of 8"),
    ],
)
def test_config_values_are_checked(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**settings)


def serve_hub(folder: Path, requests: list[str], *, status: int = 200) -> ThreadingHTTPServer:
    """Start a hub of one repository `own/backbone`, which may fail; it notes what is asked for."""

    class Hub(BaseHTTPRequestHandler):
        def answer(self) -> None:
            requests.append(self.path)
            file = folder / self.path.rpartition("/")[2]
            found = status == 200 and file.is_file()
            self.send_response(status if status != 200 else 200 if found else 404)
            data = file.read_bytes() if found else b""
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{len(data)}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound" if status == 200 else "")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_GET = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    return server


LOADED = """
from iccld.models.backbone import make_backbone
for _ in range(2):
    try:
        print(make_backbone("own/backbone", {})[0].config.model_type, flush=True)
    except (OSError, ValueError) as error:
        print(type(error).__name__, flush=True)
"""


def load_from(server: ThreadingHTTPServer, home: Path) -> list[str]:
    """Load the backbone twice in a process of its own; return what each gave."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home)}
    command = [sys.executable, "-c", LOADED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    return done.stdout.split()


def test_the_hub_is_asked_once_and_no_more_when_there_is_a_copy(tmp_path: Path):
    make_encoder("segformer").backbone.save_pretrained(tmp_path / "hub")
    requests: list[str] = []
    server = serve_hub(tmp_path / "hub", requests)
    assert load_from(server, tmp_path / "home") == ["segformer", "segformer"]
    of_weights = [path for path in requests if path.endswith("model.safetensors")]
    assert 0 < len(of_weights) <= 2, "a HEAD and a GET, of the first of the two"
    requests.clear()
    assert load_from(server, tmp_path / "home") == ["segformer", "segformer"]
    assert requests == []
    server.shutdown()


def test_a_hub_that_lacks_the_model_is_the_user_s_fault_and_one_that_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server = serve_hub(tmp_path / "nothing", [], status=404)
    assert load_from(server, tmp_path / "home") == ["ValueError", "ValueError"]
    server.shutdown()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for status, is_away in ((429, True), (503, True), (500, True), (401, False)):
        answer = Mock(status_code=status, headers={})
        error = OSError("no model")
        error.__cause__ = HfHubHTTPError("", response=answer)
        assert _is_away(error) == is_away
    unreachable = OSError("no model")
    unreachable.__cause__ = LocalEntryNotFoundError("no connection, and no copy")
    assert _is_away(unreachable) and not _is_away(OSError("no model"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not _is_away(unreachable), "the user wants it so"
