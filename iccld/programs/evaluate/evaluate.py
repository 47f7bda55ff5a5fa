"""`iccld evaluate`: scores of a run's finished stages, or of one model folder, on the validation set."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape

from iccld.config import Config, load_config, read_config
from iccld.data.config import locations, of_saved_run, refuse_unasked
from iccld.data.stream.sets import sets_kept_open
from iccld.durable import make_folder, refuse_links, write_whole
from iccld.evaluation import EvaluationResult, Predict, results_table
from iccld.inference.source import find_model
from iccld.models.iccld import ICCLD
from iccld.models.model_card import CARD_NAME
from iccld.programs.evaluate.results import about_of, finished_models, own_results, place_for, read_results
from iccld.programs.evaluate.scoring import GiveUp, diagnose_model, evaluate_predictor, never, student_beside
from iccld.programs.run.checks import new_watchdog
from iccld.programs.run.hand_off import is_finished
from iccld.programs.run.out_of_memory import explained_lack_for_scores
from iccld.programs.run.saved_scores import evaluations
from iccld.programs.run.signs import signs_of_diagnosis, tell
from iccld.redact import redacted, without_secrets
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.preemption import Preempted, Preemption
from iccld.runtime.faults.watchdog import Watchdog
from iccld.runtime.measure.telemetry import write_event
from iccld.runtime.measure.terminal import Terminal
from iccld.runtime.ranks import Ranks, together
from iccld.runtime.settings import Compile
from iccld.schema import key_of
from iccld.scores import mean_result
from iccld.stages.settings import Weights
from iccld.stages.table import STAGES, stage_of
from iccld.tables import table_console
from iccld.texts import shown

DIAGNOSTICS = "diagnostics"


def asks(preemption: Preemption, watchdog: Watchdog) -> GiveUp:
    """Return the function that is asked before each image whether to give up; it also ticks the watchdog."""
    return lambda done, total: watchdog.tick(done, total) or preemption.came


def stopped(config: Config, ranks: Ranks, stage: str) -> bool:
    """Note that a signal stopped work that has nothing to save; return False."""
    if ranks.is_main:
        write_event(Path(config.run_dir), "preempted", stage=stage)
    return False


def saved_settings(run_dir: Path, overrides: Sequence[str]) -> Config:
    """Read the settings of a run, which may be a stranger's, with those of the command line.

    Raises ValueError if there is no run, or its validation set must not be read unasked (`of_saved_run`).
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"there is no run in {run_dir} (no config.yaml); give a folder that train wrote.")
    if given := [word for word in overrides if key_of(word) == "run_dir"]:
        raise ValueError(f"{given[0]}: the run is what stands first, {run_dir}; leave the setting out.")
    roles = ["validation"]
    config = read_config(path, [*overrides, f"run_dir={run_dir}"], keep=partial(of_saved_run, roles=roles))
    refuse_unasked(config.data, roles=roles, where=str(path))
    own, other = read_config(path).data.validation, config.data.validation
    is_named = any(key_of(word) == "data.validation.name" for word in overrides)
    if without_secrets(own.shards) != without_secrets(other.shards) and other.name == own.name and not is_named:
        other.name = ""  # another set has not that one's name
    config.inference.refuse_no_denoising(config.stages)
    return config


def settings_and_model(source: str, overrides: Sequence[str], *, shards: str, output: Path) -> tuple[Config, str]:
    """Return the settings to score by, and the model folder, empty for a run's own models.

    source: a run directory, or a model (see `find_model`), which is scored on `shards`, by the defaults and the
    overrides, into `output`. For a run, `shards` replaces its validation sets. Raises ValueError.
    """
    words = [f"data.validation.shards={shards}", "data.validation.name=", *overrides] if shards else [*overrides]
    if (Path(source) / "config.yaml").is_file():
        config, model = saved_settings(Path(source), words), ""
        if shards:
            config.data.validation.also = {}
        return config, model
    if not shards and (Path(source) / CARD_NAME).is_file():
        raise ValueError(f"{source} is a model without a run; name the set to score it on: --shards FOLDER.")
    if not shards:
        return saved_settings(Path(source), words), ""  # raises the error that there is no run
    model = find_model(source)
    return load_config([*words, f"run_dir={output}"]), str(model)


def evaluate_run(
    config: Config,
    preemption: Preemption | None = None,
    *,
    model_folder: str = "",
    terminal: Terminal | None = None,
) -> bool:
    """Score the run's finished stages, or one model folder; False if a signal ended it. Call on every rank."""
    preemption = preemption or Preemption()
    preemption.config = config.preemption
    folders = [Path(model_folder)] if model_folder else finished_models(config)
    if not folders:
        finished = [name for name in reversed([*STAGES]) if is_finished(Path(config.run_dir), name)]
        if finished and config.inference.weights is Weights.best:
            find_model(Path(config.run_dir), weights="best", stages=finished)  # raises: none of them has one
        finals = ", ".join(f"{name}/final" for name in STAGES)
        raise ValueError(f"run_dir={config.run_dir} holds no finished stage ({finals}); train first.")
    # The run may be training meanwhile, with heartbeats of its own.
    beats = Path(config.run_dir) / "heartbeats" / "evaluate"
    refuse_links(Path(config.run_dir) / "report", within=Path(config.run_dir))
    with (
        Engine(dataclasses.replace(config.engine, compile=Compile.none)) as engine,  # scoring runs eagerly
        new_watchdog(config, engine.ranks, beats_in=beats) as watchdog,
        sets_kept_open(),
    ):
        if terminal is not None:
            terminal.follow(watchdog)
        watchdog.begin("evaluation")
        watchdog.phase("evaluate")
        if engine.ranks.is_main:
            for key, location in locations(config.data, ["validation"], with_keys=True).items():
                print(shown(f"on {key}={without_secrets(location)}"), flush=True)
        try:
            evaluate_models(folders, config, engine, give_up=asks(preemption, watchdog))
        except Preempted:
            return stopped(config, engine.ranks, "evaluation")
    return True


def evaluate_models(
    folders: Sequence[Path], config: Config, engine: Engine, *, give_up: GiveUp = never
) -> dict[str, Any]:
    """Score model folders and write `report/results.json`, or a file of their own: see `results.py`.

    Returns `{"stage1": scores, "stage2": {"1": scores, ...}, "stage2_mean_latent": scores}`, as far as they exist, and
    under `about` what was scored, and how. The mean latent is a control: denoising must be worth more than it. Under
    `diagnostics` are those of each stage; their signs of failure are told.
    """
    about: dict[str, Any] = {}

    def find_place() -> None:
        if engine.ranks.is_main:
            about.update(about_of(folders, config))
            place_for(folders, config, about)

    together(find_place, engine.ranks)  # a damaged file there is reported before the scores are computed
    results: dict[str, Any] = {}
    with explained_lack_for_scores(engine.device):
        for folder in folders:
            if engine.ranks.is_main:
                print(f"scoring {folder}", flush=True)
            score = partial(evaluate_predictor, config=config, engine=engine, give_up=give_up)
            results |= score_model(load_matching_model(folder, config).to(engine.device), config, score)
        if config.evaluation.diagnostic_images:
            together(partial(_keep, results, folders, config, about), engine.ranks)
            results[DIAGNOSTICS] = _diagnose(folders, config, engine, give_up)
    if engine.ranks.is_main:
        path = _write(results, folders, config, about)
        _show(results, about, path)
    return results


def _keep(results: Mapping[str, Any], folders: Sequence[Path], config: Config, about: Mapping[str, Any]) -> None:
    """Write scores whose diagnostics may yet fail or be stopped, unless there are scores of the same weights."""
    if not about:  # on another rank than the first
        return
    path = place_for(folders, config, about)
    if not path.exists() or read_results(path)["about"]["sha256"] != about["sha256"]:
        _write({**results, DIAGNOSTICS: {}}, folders, config, about)


def _diagnose(folders: Sequence[Path], config: Config, engine: Engine, give_up: GiveUp) -> dict[str, Any]:
    """Return the diagnostics by stage; the last model's have bounds, since its E and D are those of the one before."""
    found: dict[str, Any] = {}
    for folder in folders:
        teacher, beside = load_matching_model(folder, config).to(engine.device), student_beside(folder)
        student = load_matching_model(beside, config).to(engine.device) if beside else None
        options = {"student": student, "with_bounds": folder == folders[-1], "give_up": give_up}
        diagnosis = diagnose_model(teacher, config, engine, **options)
        stage = stage_of(teacher).name
        found[stage] = diagnosis.to_json()
        if engine.ranks.is_main:
            run_dir = Path(config.run_dir) if folder in finished_models(config) else None
            tell(signs_of_diagnosis(diagnosis), run_dir=run_dir, stage=stage)
    return found


def unscored_stages(config: Config) -> list[str]:
    """Return the finished stages that the report does not hold; all, if their diagnostics were not finished."""
    path = own_results(config)
    scored = read_results(path) if path.exists() else {}
    is_whole = scored.get(DIAGNOSTICS) != {}
    return [stage for folder in finished_models(config) if (stage := folder.parts[-3]) not in scored or not is_whole]


def load_matching_model(folder: Path, config: Config) -> ICCLD:
    """Load a model for the settings. Raises ValueError if its classes are not the data's."""
    model = ICCLD.from_pretrained(folder, attention=config.model.denoiser.attention)
    assert model.card is not None
    own, names = model.card.class_names, config.data.class_set.build().names
    if own != list(names):
        raise ValueError(
            f"{folder} tells {len(own)} classes apart ({', '.join(own)}), data.class_set has {len(names)} "
            f"({', '.join(names)}); repeat the data.classes, data.class_set or dataset=NAME that it was trained with."
        )
    return model


def score_model(model: ICCLD, config: Config, score: Callable[[Predict], EvaluationResult]) -> dict[str, Any]:
    """Score a model as its stage says; `score` scores one predict function."""

    def of_seeds(predictors: Sequence[Predict]) -> dict[str, Any]:
        return _scores([score(predict) for predict in predictors])

    return stage_of(model).scores(model, config.inference, seed=config.seed, score=of_seeds)


def _scores(by_noise_seed: list[EvaluationResult]) -> dict[str, Any]:
    """Return the means over the seeds; of several seeds, also the mIoU of each."""
    first, *others = by_noise_seed
    if not others:
        return first.to_json()
    of_seeds = [result.to_json()["miou"] for result in by_noise_seed]
    return mean_result(by_noise_seed).to_json() | {"miou_by_noise_seed": of_seeds}


def named_results(results: Mapping[str, Any]) -> dict[str, EvaluationResult]:
    """Flatten the results for tables: `stage1`, `stage2 x1`, ..."""
    fields = {field.name for field in dataclasses.fields(EvaluationResult)}
    return {
        each.label.replace("_", " "): EvaluationResult(
            **{key: _numbers(value) for key, value in each.scores.items() if key in fields}
        )
        for each in evaluations(results)
    }


def _numbers(value: Any) -> Any:
    """Turn JSON's null back into NaN."""
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float("nan") if value is None else value


def _write(results: Mapping[str, Any], folders: Sequence[Path], config: Config, about: Mapping[str, Any]) -> Path:
    """Write the scores. A training may have left another stage meanwhile, so the place is looked for again."""
    path = place_for(folders, config, about)
    make_folder(path.parent, within=path.parent.parent)
    write_whole(path, json.dumps(redacted({"about": about, **results}), indent=1))
    return path


def _show(results: Mapping[str, Any], about: Mapping[str, Any], path: Path) -> None:
    console = table_console()
    with console.capture() as table:  # and printed as all else is, above a line that may be alive
        console.print(results_table(named_results(results), title=escape(", ".join(about["models"]))))
    print(table.get(), end="")
    print(f"written to {path}", flush=True)
