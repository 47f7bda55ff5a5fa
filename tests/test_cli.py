"""Commands that a user types: the verbs on a tiny run, and one clear line for each error, before training starts."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from iccld.cli import main
from iccld.data.storage.index import ShardIndex
from iccld.data.stream.order import EpochOrder
from iccld.runtime.faults.lock import locked
from iccld.settings import ScheduleConfig
from iccld.stages.settings import SegmentationConfig
from iccld.trainer import learning_rate_factor
from tests.factory import scene_overrides
from tests.forked import Forked

QUICK = ["stage1.trainer.num_steps=2", "stage2.trainer.num_steps=2", "inference.num_steps=[1,2]"]
QUICK += ["evaluation.diagnostic_images=8"]


@pytest.fixture(scope="module")
def run_dir(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *scene_overrides(scene_shards, folder), *QUICK]) == 0
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the verb ends with."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_train_leaves_the_run_directory_of_the_readme(run_dir: Path):
    for path in (
        "config.yaml",
        "metrics.jsonl",
        "events.jsonl",
        "report/results.json",
        "stage1/checkpoints/step_00000002/manifest.json",
        "stage1/checkpoints/latest",
        "stage1/final/teacher/model.safetensors",
        "stage2/final/student/config.json",
    ):
        assert (run_dir / path).is_file(), path
    results = json.loads((run_dir / "report/results.json").read_text())
    assert set(results) == {"about", "stage1", "stage2", "stage2_mean_latent", "diagnostics"}
    assert set(results["stage2"]) == {"1", "2"}
    assert results["stage1"]["num_images"] == 5 and len(results["stage1"]["iou"]) == 19
    of_stages = results["diagnostics"]
    assert set(of_stages["stage1"]) == {"num_images", "stage1", "own_latent", "student", "labels_at_16"}
    assert {"fitted_latent", "other_latent", "denoised", "z_0_at_999", "student"} < set(of_stages["stage2"])
    assert all(found["num_images"] == 5 for found in of_stages.values()), "there are fewer than asked for"
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    of_stage1 = {name for entry in entries if entry["stage"] == "stage1" for name in entry}
    assert {"pseudo_classes/distance", "pseudo_classes/lost", "disagreement"} < of_stage1
    assert {"learning_rate/encoder", "learning_rate/decoder", "gradient_norm"} < of_stage1


def test_each_step_is_made_at_the_rate_of_the_schedule(run_dir: Path):
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = [(e["step"], e["learning_rate/decoder"]) for e in entries if "learning_rate/decoder" in e]
    schedule, full = ScheduleConfig(warmup_steps=2), SegmentationConfig().decoder_learning_rate
    factors = [learning_rate_factor(step, num_steps=2, config=schedule) for step in range(2)]
    assert logged == [(1, pytest.approx(full * factors[0])), (2, pytest.approx(full * factors[1]))]


def test_the_final_scores_are_in_the_metrics_once_also_after_a_kill_before_them(run_dir: Path, scene_shards: Path):
    path = run_dir / "metrics.jsonl"
    text, results = path.read_text(), json.loads((run_dir / "report/results.json").read_text())
    entries = [json.loads(line) for line in text.splitlines()]
    of_stage1, of_stage2 = [entry for entry in entries if any(name.startswith("final/") for name in entry)]
    assert (of_stage1["stage"], of_stage1["step"]) == ("stage1", 2)
    assert (of_stage2["stage"], of_stage2["step"]) == ("stage2", 2)
    assert of_stage1["final/miou"] == results["stage1"]["miou"]
    assert of_stage2["final/x2/miou"] == results["stage2"]["2"]["miou"]
    assert of_stage2["final/mean_latent/miou"] == results["stage2_mean_latent"]["miou"]
    by_class = dict(zip(results["stage1"]["names"], results["stage1"]["iou"], strict=True))
    assert {name: of_stage1.get(f"final/iou/{name}") for name in by_class} == by_class
    path.write_text("".join(line for line in text.splitlines(keepends=True) if "final/" not in line))
    assert main(["train", *scene_overrides(scene_shards, run_dir), *QUICK]) == 0
    assert sorted(path.read_text().splitlines()) == sorted(text.splitlines())


def test_a_score_in_mid_training_has_diagnostics_without_the_bounds(scene_shards: Path, tmp_path: Path):
    more = ["stage2.trainer.evaluate_every=1", "evaluation.diagnostic_images=2", "evaluation.max_images=3"]
    assert main(["train", *scene_overrides(scene_shards, tmp_path), *QUICK, *more]) == 0
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = [entry for entry in entries if "miou" in entry]
    assert [(entry["stage"], entry["step"]) for entry in scores] == [("stage2", 1), ("stage2", 2)]
    for entry in scores:
        assert {"boundary_miou", "iou/road", "diagnostics/z_0_at_999", "diagnostics/disagreement"} < set(entry)
        assert "diagnostics/fitted_latent" not in entry
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert results["diagnostics"]["stage2"]["num_images"] == 2
    assert main(["evaluate", str(tmp_path), "evaluation.diagnostic_images=0"]) == 0
    assert "diagnostics" not in json.loads((tmp_path / "report/results.json").read_text())


def test_training_a_finished_run_again_ends_at_once(
    run_dir: Path, scene_shards: Path, capsys: pytest.CaptureFixture[str]
):
    files = [run_dir / name for name in ("metrics.jsonl", "events.jsonl")]
    before = [file.read_bytes() for file in files]
    assert main(["train", *scene_overrides(scene_shards, run_dir), *QUICK]) == 0
    assert "stage1 is finished" in capsys.readouterr().out
    assert [file.read_bytes() for file in files] == before, "also its goodput is what it was"


def test_evaluate_scores_the_student_or_another_model_beside_the_teacher(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    kept = (run_dir / "report/results.json").read_bytes()
    assert main(["evaluate", str(run_dir), "inference.weights=student", "inference.num_steps=[3]"]) == 0
    assert "stage2 x3" in capsys.readouterr().out
    assert main(["evaluate", str(run_dir), "--model", str(run_dir / "stage1/final/student")]) == 0
    assert (run_dir / "report/results.json").read_bytes() == kept
    (of_student,) = run_dir.glob("report/results_student_camera_val_x3_*.json")
    found = json.loads(of_student.read_text())
    assert set(found) == {"about", "stage1", "stage2", "stage2_mean_latent", "diagnostics"}
    assert "student" not in found["diagnostics"]["stage2"], "it is the student that is scored"
    (of_model,) = run_dir.glob("report/results_stage1_student_camera_val_*.json")
    assert set(json.loads(of_model.read_text())) == {"about", "stage1", "diagnostics"}


def test_a_stage_that_is_trained_later_is_scored_too(scene_shards: Path, tmp_path: Path):
    few = ["inference.num_steps=[1]", "evaluation.max_images=1", "evaluation.diagnostic_images=1"]
    overrides = [*scene_overrides(scene_shards, tmp_path), *QUICK, *few]
    assert main(["train", *overrides, "stages=[stage1]"]) == 0
    assert set(json.loads((tmp_path / "report/results.json").read_text())) == {"about", "stage1", "diagnostics"}
    assert main(["train", *overrides]) == 0
    assert "stage2" in json.loads((tmp_path / "report/results.json").read_text())


def test_evaluate_over_several_noise_seeds_reports_all(run_dir: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    assert main(["evaluate", str(copy), "inference.num_steps=[1]", "inference.noise_seeds=2"]) == 0
    kept = (copy / "report/results.json").read_bytes()
    assert kept == (run_dir / "report/results.json").read_bytes(), "of other settings"
    (path,) = copy.glob("report/results_teacher_*_x1_*.json")
    scores = json.loads(path.read_text())["stage2"]["1"]
    assert len(scores["miou_by_noise_seed"]) == 2
    assert scores["miou"] == pytest.approx(sum(scores["miou_by_noise_seed"]) / 2)


@pytest.mark.parametrize("arguments", [[], ["--num-steps", "2"], ["--sliding-window"], ["--size", "48x96"]])
def test_predict_writes_a_label_and_an_overlay_an_image(
    run_dir: Path, scene_shards: Path, tmp_path: Path, arguments: list[str]
):
    image = scene_shards / "gta5/images/00001.png"
    assert main(["predict", str(run_dir), str(image), str(tmp_path), *arguments]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"00001_label.png", "00001_overlay.png", "legend.png"}


def test_config_prints_what_train_would_use(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "experiment=demo", "seed=7"]) == 0
    printed = capsys.readouterr().out
    assert "seed: 7" in printed and "pretrained: ''" in printed


def test_a_folder_of_ones_own_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 42\n")
    assert main(["config", "--config-dir", str(tmp_path), "experiment=mine"]) == 0
    assert "seed: 42" in capsys.readouterr().out


def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.trainer.num_stepz=3", "num_stepz"),
        ("seed=many", "seed"),
        ("experiment=nope", "nope"),
        ("stage1.trainer.num_steps=0", "stage1.trainer.num_steps=0 must be at least 1"),
        ("data.crop_size=[50,64]", "data.crop_size=[50, 64] must be [height, width], multiples of 8"),
        ("data.crop_size=[512,512]", "data.crop_size=[512, 512] is larger than sample"),
        ("data.source.shards=/nowhere", "data.source.shards=/nowhere: there is no such folder"),
        ("stage1.trainer.global_batch_size=3", "stage1.trainer.global_batch_size=3 must be a multiple of"),
        ("engine.precision=fp16", "fp16"),
        ("model.denoiser.attention=xformers", "xformers"),
        ("model.encoder.pretrained=/nowhere", "model.encoder"),
        ("initial_model=/nowhere", "/nowhere"),
        ("data.target.shards=", "adaptation needs target images"),
        ("data.validation.shards=/nowhere", "data.validation.shards=/nowhere"),
        ("stage2.trainer.global_batch_size=3", "stage2.trainer.global_batch_size=3 must be a multiple of"),
        ("stages=[stage2]", "needs stage 1's model"),
        ("inference.num_steps=[-1]", "inference.num_steps=[-1]"),
        ("inference.num_steps=[0]", "inference.num_steps=[0] would score stage 2 by the decoder alone"),
        ("statistics_samples=0", "statistics_samples=0 must be at least 1"),
        ("stages=[]", "stages=[] must be"),
        ("evaluation.num_classes=7", "evaluation.num_classes=7 does not fit a model of 19 classes; use 19, 16 or 13"),
        ("stage1.objective.masked_block=0", "masked_block=0 must be above 0"),
        ("stage2.objective.learning_rate=-1", "learning_rate=-1.0 must be above 0"),
        ("stage1.objective.feature_distance_weight=0.005", "set model.encoder.pretrained"),
        ("run_dir=/proc/none", "/proc/none"),
    ],
)
def test_a_wrong_setting_is_one_line_before_training(
    scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
):
    line = refused(["train", *scene_overrides(scene_shards, tmp_path / "run"), *QUICK, override], capsys)
    assert message in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_source_shards_need_labels(scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides = [*scene_overrides(scene_shards, tmp_path / "run"), f"data.source.shards={scene_shards}/target"]
    assert "has no labels" in refused(["train", *overrides], capsys)


def test_a_run_directory_belongs_to_one_config(run_dir: Path, scene_shards: Path, capsys: pytest.CaptureFixture[str]):
    line = refused(["train", *scene_overrides(scene_shards, run_dir), *QUICK, "seed=1"], capsys)
    assert "holds a run of another config (seed: 0 -> 1)" in line and "use another run_dir" in line


def test_a_refused_start_leaves_the_run_directory_free(
    scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    overrides = [*scene_overrides(scene_shards, tmp_path), *QUICK, "stages=[stage1]"]
    assert "is larger than" in refused(["train", *overrides, "data.crop_size=[512,512]"], capsys)
    assert main(["train", *overrides]) == 0


def test_two_jobs_do_not_share_a_run_directory(scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with locked(tmp_path) as holder:
        assert holder == ""
        line = refused(["train", *scene_overrides(scene_shards, tmp_path), *QUICK], capsys)
    assert f"is in use by process {os.getpid()} on" in line and "use another run_dir" in line
    with locked(tmp_path) as holder:  # free again
        assert holder == ""


def test_settings_of_a_stage_that_has_not_begun_may_change(
    run_dir: Path, scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "stage2")
    overrides = [*scene_overrides(scene_shards, copy), *QUICK, "stage2.objective.learning_rate=1e-5"]
    assert main(["train", *overrides]) == 0
    overrides[-1] = "stage2.objective.learning_rate=1e-6"
    assert "stage2.objective.learning_rate: 1e-05 -> 1e-06" in refused(["train", *overrides], capsys)


def test_a_checkpoint_of_another_data_set_is_refused(
    run_dir: Path, scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "stage1" / "final")
    overrides = [*scene_overrides(scene_shards, copy), *QUICK, f"data.source.shards={scene_shards}/target_labelled"]
    assert "is of another data" in refused(["train", *overrides], capsys)


def test_a_model_of_other_classes_is_not_evaluated(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    classes = ["data.class_set.names=[a,b]", "data.class_set.of_train_id={0: 0, 1: 1}"]
    message = refused(["evaluate", str(run_dir), *classes], capsys)
    assert "tells 19 classes apart" in message and "repeat the data.classes, data.class_set or dataset=NAME" in message


def test_an_initial_model_of_another_shape_is_refused(
    run_dir: Path, scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    overrides = [*scene_overrides(scene_shards, tmp_path / "run"), "model.decoder.width=32"]
    line = refused(["train", *overrides, f"initial_model={run_dir}/stage1/final/teacher"], capsys)
    assert "is another model than `model` describes" in line


def test_evaluating_what_is_not_there(tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert "there is no run in" in refused(["evaluate", str(tmp_path)], capsys)
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert "holds no finished stage" in refused(["evaluate", str(tmp_path)], capsys)
    (tmp_path / "x.png").write_bytes(b"")
    words = ["predict", str(tmp_path), str(tmp_path / "x.png"), str(tmp_path / "out")]
    assert "neither a model folder" in refused(words, capsys)


def launch(num_ranks: int, verb: list[str], log: Path, **variables: str) -> Forked:
    """`iccld launch`, whose launcher is forked; the ranks of several are processes of their own."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | variables
    return Forked("iccld", ["launch", str(num_ranks), *verb], environment=environment, log=log)


@pytest.mark.distributed
@pytest.mark.parametrize(("num_ranks", "sent", "status"), [(1, signal.SIGTERM, 0), (2, signal.SIGHUP, 85)])
def test_a_signal_saves_and_the_same_command_goes_on(
    scene_shards: Path, tmp_path: Path, num_ranks: int, sent: signal.Signals, status: int
):
    """A real signal to the real launcher: every rank ends, with a checkpoint; then it goes on.

    The launcher of several ranks makes SIGTERM of SIGHUP, and ends with the status that is configured.
    """
    settings = ["stage1.trainer.num_steps=16", "stages=[stage1]", "data.validation.shards="]
    settings += [f"preemption.exit_status={status}"]
    train = ["train", *settings, "stage1.trainer.micro_batch_size=1", *scene_overrides(scene_shards, tmp_path)]
    run = launch(num_ranks, train, log := tmp_path / "log")
    while run.poll() is None and "step 3/16" not in log.read_text():
        time.sleep(0.02)
    run.send_signal(sent)
    assert run.wait(timeout=60) == status, log.read_text()
    assert "death signal" not in log.read_text(), "a rank says what became of the run, the agent nothing"
    events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events[-1] == "preempted" and not (tmp_path / "stage1/final").exists()
    assert main(train) == 0
    assert (tmp_path / "stage1/final/teacher/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_the_launcher_waits_for_a_long_step_and_its_save(scene_shards: Path, tmp_path: Path):
    """The agent would end its ranks 30 s after a signal."""
    (pace := tmp_path / "pace").write_text("0")
    settings = ["stage1.trainer.num_steps=16", "stages=[stage1]", "data.validation.shards=", "metrics.log_every=1"]
    train = ["train", *settings, "stage1.trainer.micro_batch_size=1", *scene_overrides(scene_shards, tmp_path)]
    root = Path(__file__).parents[1]
    variables = {"ICCLD_TEST_PACE": str(pace), "PYTHONPATH": f"{root}:{root}/tests/slurm/pace"}
    run = launch(2, [*train, "preemption.exit_status=85"], log := tmp_path / "log", **variables)
    while run.poll() is None and "step 3/16" not in log.read_text():
        time.sleep(0.02)
    pace.write_text("40")
    time.sleep(2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) == 85, log.read_text()


@pytest.mark.distributed
def test_what_one_rank_alone_cannot_read_is_said_in_one_line(scene_shards: Path, tmp_path: Path):
    """Only rank 1 meets the broken sample; nobody hangs, and the message names rank, shard and sample."""
    shards = tmp_path / "source"
    shutil.copytree(scene_shards / "source", shards)
    index = ShardIndex.open(shards)
    number = EpochOrder(len(index), seed=0, stream="source")[1].index
    record = index.samples[number]
    with (shards / index.shard_name(int(record["shard"]))).open("r+b") as tar:
        tar.seek(int(record["image_offset"]) + 40)
        tar.write(b"broken")
    settings = [
        "data.rare_class_sampling=false",
        "stage1.trainer.global_batch_size=2",
        "stage1.trainer.micro_batch_size=1",
    ]
    overrides = [*scene_overrides(scene_shards, tmp_path / "run"), f"data.source.shards={shards}", *settings]
    log = tmp_path / "log"
    assert launch(2, ["train", "stages=[stage1]", *overrides], log).wait(timeout=200) == 2
    (line,) = [line for line in log.read_text().splitlines() if "rank 1" in line]
    assert index.key(number) in line and "shard-" in line
    said = log.read_text()
    assert "Traceback" not in said and "master_addr" not in said, "a warning of torch about the launcher"
