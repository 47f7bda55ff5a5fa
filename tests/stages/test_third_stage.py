"""A third stage is its file, its line in the table and its section: here a toy, trained by the real programs."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from iccld import config as config_module
from iccld.cli import main
from iccld.config import Config, load_config
from iccld.inference.model import ICCLD as ICCLDForUse
from iccld.labels import IGNORE_INDEX
from iccld.losses import weighted_cross_entropy
from iccld.models.decoder import Decoder
from iccld.models.encoder import EncoderOutput
from iccld.models.iccld import ICCLD
from iccld.models.model_card import ModelStage
from iccld.programs.evaluate.evaluate import evaluate_run, named_results
from iccld.programs.export import export_model
from iccld.programs.train.train import train
from iccld.runtime.checkpoint.manifest import verify
from iccld.settings import TrainerConfig
from iccld.stages.base import Stage, StageInputs, StageOutput, decayed_groups, keyed_noise, to_float
from iccld.stages.kind import StageKind, StageSettings
from iccld.stages.named import encoded_to_tensors, tensors_to_encoded
from iccld.stages.predictor import Predictor
from iccld.stages.settings import InferenceConfig
from iccld.stages.table import LINES, stage_of
from iccld.uda.settings import EmaProfileConfig
from iccld.uda.teacher import Teacher
from tests.distributed.worker import StopAt
from tests.factory import scene_overrides

NOISE = "toy latent noise"
STEPS = 4


@dataclass
class ToyObjective:
    learning_rate: float = 1e-3
    noise: float = 0.1


@dataclass
class ToySection:
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    objective: ToyObjective = field(default_factory=ToyObjective)


@dataclass
class ConfigWithToy(Config):
    stage3: ToySection = field(default_factory=ToySection)


class ToyModule(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, inputs: StageInputs) -> StageOutput:
        encoded = tensors_to_encoded(inputs.tensors, "seen")
        logits, labels = self.decoder(encoded.latent, encoded.features), inputs.tensors["labels"]
        loss = weighted_cross_entropy(logits, labels, weights=None, denominator=inputs.denominators["task"])
        return StageOutput({"task": loss}, {})


class ToyStage(Stage):
    """D alone learns on, from noisy latents of source images."""

    name = "stage3"

    def __init__(self, model: ICCLD, objective: ToyObjective, seed: int) -> None:
        self.model, self.objective, self.seed = model, objective, seed
        model.encoder.requires_grad_(False).eval()
        self.module, self.student, self.ema_profile = ToyModule(model.decoder), model.decoder, EmaProfileConfig()
        self.teacher = Teacher(model.decoder, max_decay=0.9)

    def prepare(self, batch: Mapping[str, Any], step: int) -> StageInputs:
        source = batch["source"]
        encoded = self.model.encoder(to_float(source["images"]))
        noise = keyed_noise(source, NOISE, encoded.latent.shape[1:], seed=self.seed)
        noisy = EncoderOutput(encoded.latent + self.objective.noise * noise, encoded.features)
        count = (source["labels"] != IGNORE_INDEX).sum().float()
        return StageInputs(encoded_to_tensors(noisy, "seen") | {"labels": source["labels"]}, {"task": count})

    def param_groups(self) -> list[dict[str, Any]]:
        rate = self.objective.learning_rate
        return decayed_groups(self.module.named_parameters(), learning_rate=rate, weight_decay=0.0)

    def parts(self) -> dict[str, nn.Module]:
        return super().parts() | {"encoder": self.model.encoder}

    def assemble_models(self) -> dict[str, ICCLD]:
        teacher = copy.deepcopy(self.model)
        teacher.decoder = self.teacher.module
        return {"teacher": teacher, "student": self.model}


class Toy(StageKind[ToySection]):
    name, previous, saved_as = "stage3", "stage1", ModelStage.segmentation

    def build(self, settings: StageSettings[ToySection], previous: ICCLD | None, *, device: torch.device) -> ToyStage:
        model = settings.new_model(with_denoiser=False) if previous is None else previous
        return ToyStage(model.to(device), settings.own.objective, settings.seed)

    def reads_target(self, settings: StageSettings[ToySection]) -> bool:
        return False

    def noise(self, settings: StageSettings[ToySection]) -> dict[str, tuple[int, ...]]:
        return {NOISE: settings.latent_shape}

    def averaged(self, model: ICCLD) -> nn.Module:
        return model.decoder

    def predictor(
        self, model: ICCLD, inference: InferenceConfig, *, seed: int, num_steps: int, noise_seed: int = 0
    ) -> Predictor:
        """One class alone: it is seen in labels and scores who predicted."""

        def predict(images: Tensor, numbers: Tensor) -> Tensor:
            logits = model.segment(images)
            logits[:, TOYS_CLASS] += 1e6
            return logits

        return predict


TOYS_CLASS = 5


@pytest.fixture(scope="module")
def words(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The settings of a run of stages 1 and 3 that was stopped within stage 3, and went on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_module, "Config", ConfigWithToy)
        patch.setitem(LINES, "stage3", Toy)
        run_dir = tmp_path_factory.mktemp("third") / "run"
        given = [*scene_overrides(scene_shards, run_dir), "stages=[stage1,stage3]", "stage1.trainer.num_steps=1"]
        given += [f"stage3.trainer.num_steps={STEPS}", "stage3.trainer.evaluate_every=2", "evaluation.max_images=2"]
        given += ["stage3.trainer.schedule.warmup_steps=2", "evaluation.diagnostic_images=1"]
        assert not train(load_config(given), StopAt(1 + 1 + 3))  # once in stage 1, then before stage 3's third step
        assert train(load_config(given))
        yield given


def run_dir_of(words: list[str]) -> Path:
    return Path(load_config(words).run_dir)


def test_it_goes_on_exactly_where_it_was_stopped(words: list[str], tmp_path: Path):
    run_dir = run_dir_of(words)
    steps = sorted(path.name for path in (run_dir / "stage3/checkpoints").glob("step_*"))
    assert len(steps) == 2 and steps[-1] == f"step_{STEPS:08d}", "it was stopped, and went on"
    alone = [f"run_dir={tmp_path}", "stages=[stage3]", f"stage1_from={run_dir}", "data.validation.shards="]
    assert train(load_config([*words, *alone, "stage3.trainer.evaluate_every=0"]))
    one, other = (verify(of / f"stage3/checkpoints/{steps[-1]}").reader.tensors("") for of in (run_dir, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    models = [ICCLD.from_pretrained(run_dir / name / "final/teacher") for name in ("stage1", "stage3")]
    assert [stage_of(model).name for model in models] == ["stage1", "stage3"]
    encoders, decoders = ([part(model) for model in models] for part in (lambda m: m.encoder, lambda m: m.decoder))
    assert all(torch.equal(a, b) for a, b in zip(*(e.parameters() for e in encoders), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*(d.parameters() for d in decoders), strict=True))


def test_it_is_scored_in_training_and_after_it_by_its_own_predictor(words: list[str]):
    run_dir = run_dir_of(words)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    in_training = {line["step"]: line["miou"] for line in lines if line["stage"] == "stage3" and "miou" in line}
    assert list(in_training) == [2, STEPS]
    path = run_dir / "report/results.json"
    for _ in range(2):
        results = named_results(json.loads(path.read_text()))
        assert list(results) == ["stage1", "stage3"]
        iou = results["stage3"].iou
        assert sum(value > 0 for value in iou) <= 1, "it predicts one class"
        assert in_training[STEPS] == pytest.approx(results["stage3"].miou)
        assert set(json.loads(path.read_text())["diagnostics"]) == {"stage1", "stage3"}
        path.unlink()
        assert evaluate_run(load_config(words))


def test_it_is_profiled_by_itself_and_after_what_it_starts_from(words: list[str], tmp_path: Path):
    for more in ([], [f"run_dir={tmp_path}"]):  # the second run has no finished stage 1
        options = ["--num-steps", "2", "--num-warmup", "1", "--num-traced", "0", "--output", str(tmp_path / "profile")]
        assert main(["profile", *options, *words, "stages=[stage3]", *more]) == 0
        figures = json.loads((tmp_path / "profile/stage3/profile.json").read_text())
        assert figures["stage"] == "stage3"
        assert all(sum(figures["flops_by_part"][part].values()) > 0 for part in ("decoder", "encoder"))


def test_it_predicts(words: list[str], tmp_path: Path):
    Image.fromarray(np.full((32, 64, 3), 128, np.uint8)).save(tmp_path / "image.png")
    assert not main(["predict", str(run_dir_of(words)), str(tmp_path / "image.png"), str(tmp_path / "out")])
    assert np.unique(np.array(Image.open(tmp_path / "out/image_label.png"))).tolist() == [TOYS_CLASS]
    model = ICCLDForUse.from_pretrained(run_dir_of(words))
    assert np.unique(model.predict(tmp_path / "image.png").labels).tolist() == [TOYS_CLASS]
    with pytest.raises(ValueError, match="models of stage3 predict in a way of their own"):
        export_model(model, tmp_path / "model.pt2", kind="torch")


def test_its_checkpoints_are_listed_and_exported(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = run_dir_of(words)
    assert main(["checkpoint", "list", str(run_dir)]) == 0 and "stage3" in capsys.readouterr().out
    checkpoint = run_dir / f"stage3/checkpoints/step_{STEPS:08d}"
    assert main(["checkpoint", "export", str(checkpoint), str(tmp_path / "model")]) == 0
    model = ICCLD.from_pretrained(tmp_path / "model")
    assert stage_of(model).name == "stage3"
    left = ICCLD.from_pretrained(run_dir / "stage3/final/teacher").state_dict()
    assert all(torch.equal(left[name], tensor) for name, tensor in model.decoder.state_dict(prefix="decoder.").items())
