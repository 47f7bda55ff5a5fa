"""`iccld export`: the file runs without iccld, at other sizes, and is kept only if it gives the model's logits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from iccld.cli import main
from iccld.demo.scenes import write_gta5
from iccld.inference.model import ICCLD
from iccld.models.settings import ModelConfig
from iccld.programs import export
from tests.inference.test_model import save
from tests.models.factory import trained_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the default kinds of latent and condition."""
    kinds = ModelConfig()
    model = trained_model(latent=kinds.latent, condition=kinds.condition)
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("num_steps", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_onnx_runs_on_another_batch_and_size(
    folder: Path, tmp_path: Path, num_steps: int, caplog: pytest.LogCaptureFixture
):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    write_gta5(tmp_path / "scenes", count=2, seed=0, height=64, width=128)
    words = ["export", str(folder), str(tmp_path / "model.onnx"), "--num-steps", str(num_steps), "--images"]
    assert main([*words, *map(str, sorted((tmp_path / "scenes/images").glob("*.png")))]) == 0
    assert not [record for record in caplog.records if "torchvision" in record.getMessage()]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images, noise = torch.rand(3, 3, 64, 128), torch.randn(3, 4, 8, 16)
    given = {"images": images.numpy()} | ({"noise": noise.numpy()} if num_steps else {})
    (logits,) = session.run(None, given)
    with torch.no_grad():
        own = ICCLD.from_pretrained(folder)(images, noise=noise if num_steps else None, num_steps=num_steps)
    np.testing.assert_allclose(logits, own.numpy(), atol=1e-4 * float(own.abs().max()))


def test_a_program_of_torch_runs_without_the_model(folder: Path, tmp_path: Path):
    assert main(["export", str(folder), str(tmp_path / "model.pt2"), "--num-steps", "1"]) == 0
    program = torch.export.load(str(tmp_path / "model.pt2")).module()
    model = ICCLD.from_pretrained(folder)
    for batch, height, width in ((3, 64, 128), (65, 64, 64), (1, 64, 8224)):
        images, noise = torch.rand(batch, 3, height, width), torch.randn(batch, 4, height // 8, width // 8)
        with torch.no_grad():
            own = model(images, noise=noise, num_steps=1)
            torch.testing.assert_close(program(images, noise), own)


def test_a_file_that_differs_from_the_model_is_not_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "_write_torch", lambda *_: None)
    monkeypatch.setattr(export, "_runner", lambda *_: lambda images: trained_model(seed=1)(images))
    with pytest.raises(ValueError, match="logits differ from the model's by"):
        export.export_model(ICCLD.from_pretrained(folder), tmp_path / "model.pt2", kind="torch")
    assert not (tmp_path / "model.pt2").exists()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["convnextv2", "mobilenet_v2", "dinov2"])
def test_programs_of_other_encoders_give_their_logits_at_several_sizes(tmp_path: Path, backbone: str):
    assert export.export_model(trained_model(backbone=backbone), tmp_path / "model.pt2", kind="torch") < 1e-5


def test_an_encoder_that_torch_cannot_export_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, strict: bool = False, **__: object) -> None:
        tried.append(strict)
        raise RuntimeError("Constraints violated (32*rows)!\n  - You marked 32*rows as dynamic")

    tried: list[bool] = []
    monkeypatch.setattr(torch.export, "export", refuse)
    model = save(trained_model(backbone="dinov3_vit"), tmp_path / "model")
    assert main(["export", str(model), str(tmp_path / "model.pt2")]) == 2
    said = capsys.readouterr().err
    assert (
        "whose encoder is a dinov3_vit (RuntimeError: Constraints violated (32*rows)!); try a file that ends in .onnx"
        in said
    )
    assert tried == [False, True] and len(said.splitlines()) == 1 and not (tmp_path / "model.pt2").exists()


@pytest.mark.parametrize(("of", "words"), [("program", "differ from the model's by nan"), ("model", "not finite")])
def test_logits_that_are_no_numbers_are_not_taken_for_equal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str, words: str
):
    model = ICCLD.from_pretrained(folder)
    monkeypatch.setattr(export, "_write_torch", lambda *_: None)
    monkeypatch.setattr(
        export, "_runner", lambda *_: lambda images: torch.full((*images.shape[:1], 19, 1, 1), torch.nan)
    )
    own = torch.nan if of == "model" else 1.0
    monkeypatch.setattr(export, "_module", lambda *_: lambda images: torch.full((*images.shape[:1], 19, 1, 1), own))
    with pytest.raises(ValueError, match=words):
        export.export_model(model, tmp_path / "model.pt2", kind="torch")
    assert not (tmp_path / "model.pt2").exists()


def test_what_cannot_be_exported_is_refused_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "there.onnx").touch()
    for output, words in (("model.bin", "must end in .pt2 or .onnx"), ("there.onnx", "exists; give a file")):
        assert main(["export", str(folder), str(tmp_path / output)]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert main(["export", str(folder), str(tmp_path / "model.onnx")]) == 2
    assert "pip install 'iccld[export]'" in capsys.readouterr().err


def test_a_file_that_onnxruntime_cannot_run_is_named_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(export, "_write_onnx", lambda module, inputs, file: file.write_bytes(b"no model"))
    assert main(["export", str(folder), str(tmp_path / "model.onnx")]) == 2
    said = capsys.readouterr().err
    assert "onnxruntime cannot run this model, whose encoder is a " in said and len(said.splitlines()) == 1
    assert said.endswith("try a file that ends in .pt2.\n") and not (tmp_path / "model.onnx").exists()
