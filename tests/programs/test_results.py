"""Scores of one evaluation never replace those of another."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iccld.config import Config, config_from, to_yaml
from iccld.programs.evaluate.evaluate import _scores as score_of_seeds
from iccld.programs.evaluate.evaluate import evaluate_models, evaluate_run, unscored_stages
from iccld.programs.evaluate.results import about_of, finished_models, own_results, place_for, read_results
from iccld.runtime.ranks import Ranks
from iccld.scores import EvaluationResult
from iccld.stages.settings import Weights

OVERRIDES = [
    "inference.num_steps=[1]", "inference.noise_seeds=2", "evaluation.image_size=[64,128]",
    "evaluation.sliding_window=true", "evaluation.window=[256,256] evaluation.stride=[128,128]",
    "evaluation.num_classes=16", "evaluation.boundary_width=3", "evaluation.max_images=2", "inference.weights=student",
    "data.validation.shards=other", "data.validation.first_percent=50", "data.validation.keys=k", "seed=3",
    "engine.precision=bf16", "data.class_set={names:[a,b],of_train_id:{0:0,1:1}}", "data.validation.name=../../x",
    "+data.validation.also={more:{shards:more}}", "data.validation.name=ü/$(x)",
]  # fmt: skip


def make_run(folder: Path, *, stages: int = 2) -> Config:
    config = replace(Config(), run_dir=str(folder))
    config.data.validation.shards = "shards/val"
    for stage in range(1, stages + 1):
        for weights in ("teacher", "student"):
            path = folder / f"stage{stage}" / "final" / weights / "model.safetensors"
            path.parent.mkdir(parents=True)
            path.write_text(f"{stage} {weights}")
    (folder / "config.yaml").write_text(to_yaml(config))
    return config


def with_overrides(folder: Path, words: str) -> Config:
    from iccld.config import read_config

    return read_config(folder / "config.yaml", words.split())


def write(config: Config, folders: list[Path] | None = None) -> Path:
    folders = folders or finished_models(config)
    about = about_of(folders, config)
    path = place_for(folders, config, about)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"about": about}))
    return path


def test_every_setting_that_changes_scores_has_a_file_of_its_own(tmp_path: Path):
    make_run(tmp_path)
    configs = [with_overrides(tmp_path, words) for words in ["", *OVERRIDES]]
    paths = [write(config) for config in configs]
    assert len({*paths}) == len(paths) and paths[0] == tmp_path / "report/results.json"
    assert {path.parent for path in paths} == {tmp_path / "report"}
    assert all(len(path.name) < 130 and path.name.isascii() for path in paths), paths
    assert [write(config) for config in configs] == paths, "the same again replaces its own"
    for config, path in zip(configs, paths, strict=True):
        assert read_results(path)["about"] == json.loads(json.dumps(about_of(finished_models(config), config)))


def test_another_model_has_a_file_of_its_own_by_its_weights(tmp_path: Path):
    config = make_run(tmp_path / "run")
    own = write(config)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_text("a")
    first = write(config, [folder])
    (folder / "model.safetensors").write_text("b")
    second = write(config, [folder])
    assert len({own, first, second}) == 3 and first.name.startswith("results_model_")
    of_student = write(config, [tmp_path / "run/stage1/final/student"])
    assert of_student.name.startswith("results_stage1_student_")


def test_a_stage_that_is_finished_later_goes_into_the_same_file(tmp_path: Path):
    config = make_run(tmp_path, stages=1)
    first = write(config)
    make_run(tmp_path / "other")
    (tmp_path / "other/stage2").rename(tmp_path / "stage2")
    assert write(config) == first == own_results(config)
    assert [path.name for path in first.parent.iterdir()] == ["results.json"]


def test_the_best_model_of_a_stage_that_is_in_training_is_not_scored(tmp_path: Path):
    """A score would be of a model that may yet change, and the end of the training would take it for done."""
    config = make_run(tmp_path, stages=1)
    config.inference.weights = Weights.best
    for stage in ("stage1", "stage2"):
        folder = tmp_path / stage / "best/step_00000002"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"origin": {"score": {"miou": 1.0}}}')
    assert finished_models(config) == [tmp_path / "stage1/best/step_00000002"]
    assert unscored_stages(config) == ["stage1"]
    (tmp_path / "stage2/final").mkdir()
    assert unscored_stages(config) == ["stage1", "stage2"]


def test_a_finished_run_that_has_kept_no_best_model_is_told_so(tmp_path: Path):
    config = make_run(tmp_path)
    config.inference.weights = Weights.best
    with pytest.raises(ValueError, match=r"holds no best teacher of stage2, .* \(stage2\.trainer\.evaluate_every\)"):
        evaluate_run(config)
    with pytest.raises(ValueError, match="holds no finished stage"):
        evaluate_run(replace(config, run_dir=str(tmp_path / "other")))


def test_a_run_whose_settings_of_scoring_have_changed_keeps_the_old_scores(tmp_path: Path):
    """Training goes on by other settings of scoring, which it may."""
    write(make_run(tmp_path))
    before = (tmp_path / "report/results.json").read_bytes()
    later = with_overrides(tmp_path, "inference.num_steps=[2]")
    (tmp_path / "config.yaml").write_text(to_yaml(later))
    assert write(later).name == "results.json"
    (kept,) = set((tmp_path / "report").iterdir()) - {tmp_path / "report/results.json"}
    assert kept.read_bytes() == before and "x1-4_" in kept.name


def test_scores_of_an_earlier_version_are_kept(tmp_path: Path):
    config = make_run(tmp_path)
    (tmp_path / "report").mkdir()
    old = {"about": {"models": ["x"], "data": {"shards": "a/b"}}, "stage1": {"miou": 1.0}}
    (tmp_path / "report/results.json").write_text(json.dumps(old))
    write(config)
    (kept,) = set((tmp_path / "report").iterdir()) - {tmp_path / "report/results.json"}
    assert json.loads(kept.read_text()) == old


def test_scores_that_do_not_say_of_what_are_kept(tmp_path: Path):
    config = make_run(tmp_path)
    (tmp_path / "report").mkdir()
    for number, name in enumerate(["results_before.json", "results_before_2.json"]):
        old = json.dumps({"stage1": {"miou": number}})
        (tmp_path / "report/results.json").write_text(old)
        assert write(config).name == "results.json"
        assert (tmp_path / "report" / name).read_text() == old
    assert len(list((tmp_path / "report").iterdir())) == 3


@pytest.mark.parametrize("name", ["report/results.json", "config.yaml"])
def test_what_is_damaged_is_said_before_anything_is_scored(tmp_path: Path, name: str):
    config = make_run(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / name).write_text("{")

    engine: Any = SimpleNamespace(ranks=Ranks())
    with pytest.raises(ValueError, match=name):  # and not that the model folders are none
        evaluate_models(finished_models(config), config, engine)


def scored_by(score: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let `score` stand for the scoring of models; return an engine for it."""
    model = SimpleNamespace(to=lambda device: None)
    for name, stand_in in (
        ("load_matching_model", lambda *_: model),
        ("score_model", score),
        ("results_table", lambda *_, **__: ""),
        ("named_results", lambda results: {}),
    ):
        monkeypatch.setattr(f"iccld.programs.evaluate.evaluate.{name}", stand_in)
    return SimpleNamespace(ranks=Ranks(), device="cpu")


def test_scores_of_a_run_that_finishes_meanwhile_replace_none_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stage 1 is scored while stage 2 trains; before that is through, the training ends and writes all scores."""
    config = make_run(tmp_path, stages=1)
    config.evaluation.diagnostic_images = 0
    make_run(tmp_path / "other")

    def score(*_: Any) -> dict[str, Any]:
        (tmp_path / "other/stage2").rename(tmp_path / "stage2")
        write(config)
        return {"stage1": {"miou": 1.0}}

    engine = scored_by(score, monkeypatch)
    evaluate_models(finished_models(config), config, engine)
    assert len(read_results(own_results(config))["about"]["models"]) == 2, "those of both stages"
    (beside,) = set((tmp_path / "report").iterdir()) - {own_results(config)}
    assert beside.name.startswith("results_stage1_teacher_") and read_results(beside)["stage1"] == {"miou": 1.0}


@pytest.mark.parametrize("is_repeated", [False, True])
def test_scores_outlive_their_diagnostics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_repeated: bool):
    config = make_run(tmp_path, stages=1)
    engine = scored_by(lambda *_: {"stage1": {"miou": 1.0}}, monkeypatch)

    def evaluate(found: dict[str, Any] | None) -> None:
        def diagnose(*_: Any) -> dict[str, Any]:
            if found is None:
                raise MemoryError
            return found

        monkeypatch.setattr("iccld.programs.evaluate.evaluate._diagnose", diagnose)
        evaluate_models(finished_models(config), config, engine)

    whole = {"stage1": {"latent": {}}}
    if is_repeated:
        evaluate(whole)
    with pytest.raises(ValueError, match="out of memory while scoring"):
        evaluate(None)
    kept = read_results(own_results(config))
    assert kept["stage1"] == {"miou": 1.0} and kept["diagnostics"] == (whole if is_repeated else {})
    assert unscored_stages(config) == ([] if is_repeated else ["stage1"]), "they are made when the run goes on"
    evaluate(whole)
    assert read_results(own_results(config))["diagnostics"] == whole and not unscored_stages(config)
    (tmp_path / "stage1/final/teacher/model.safetensors").write_text("trained for longer")
    with pytest.raises(ValueError, match="out of memory while scoring"):
        evaluate(None)
    assert unscored_stages(config) == ["stage1"], "what stood there was of other weights"


def test_scores_with_nothing_to_count_are_null_with_several_noise_seeds():
    nothing = EvaluationResult(["a"], [math.nan], [math.nan], math.nan, math.nan, math.nan, math.nan, num_images=1)
    scores = score_of_seeds([nothing, nothing])
    assert scores["miou"] is None and scores["miou_by_noise_seed"] == [None, None]
    json.dumps(scores, allow_nan=False)


def test_scores_of_several_noise_seeds_are_means_of_each_figure():
    nan = math.nan
    one = EvaluationResult(["a", "b"], [40.0, nan], [10.0, nan], 40.0, 10.0, 80.0, 60.0, num_images=3)
    two = EvaluationResult(["a", "b"], [44.0, 0.0], [20.0, nan], 22.0, 20.0, 84.0, 62.0, num_images=3)
    scores = score_of_seeds([one, two])
    assert scores["iou"] == [42.0, 0.0] and scores["boundary_iou"] == [15.0, None]
    figures = [scores[name] for name in ("miou", "boundary_miou", "pixel_accuracy", "mean_accuracy", "num_images")]
    assert figures == [31.0, 15.0, 82.0, 61.0, 3] and scores["miou_by_noise_seed"] == [40.0, 22.0]
    assert score_of_seeds([one]) == one.to_json()


@pytest.mark.parametrize("text", ["", "[]", "{", "nul"])
def test_a_file_without_scores_is_named(text: str, tmp_path: Path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json holds no scores"):
        read_results(tmp_path / "results.json")


COMBINATIONS = ["", *OVERRIDES[::3], " ".join(OVERRIDES[:2]), " ".join(OVERRIDES[1:4]), " ".join(OVERRIDES[-3:])]


@cache
def overridden(words: str) -> Config:
    """Settings take half a second each."""
    return config_from({}, where="a test", overrides=["data.validation.shards=shards/val", *words.split()])


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(COMBINATIONS), min_size=2, max_size=8))
def test_in_any_order_nothing_is_lost(tmp_path_factory: pytest.TempPathFactory, evaluations: list[str]):
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    written: dict[str, Any] = {}
    for words in evaluations:
        config = replace(overridden(words), run_dir=str(folder))
        write(config)
        about = json.loads(json.dumps(about_of(finished_models(config), config)))
        written[json.dumps(about)] = about
    found = [read_results(path)["about"] for path in (folder / "report").iterdir()]
    assert sorted(map(json.dumps, found)) == sorted(written)


def test_secrets_of_a_url_are_not_written(tmp_path: Path):
    make_run(tmp_path)
    config = config_from(
        {}, where="x", overrides=[f"run_dir={tmp_path}", "data.validation.shards=https://u:pw@h/p?sig=s3cret"]
    )
    assert "s3cret" not in json.dumps(about_of([], config)) and "pw@" not in json.dumps(about_of([], config))
