from pathlib import Path

import pytest
import yaml

from iccld.config import differences, load_config
from iccld.models.settings import ConditionKind, LatentKind
from iccld.stages.settings import AdversaryInput, DiffusionLoss

TWO_SETS = "+data.source.also={synthia:{shards:b,weight:2}}"


def changed(*overrides: str) -> list[str]:
    """Return what differs from the same settings without the overrides."""
    return differences(load_config([TWO_SETS]), load_config([TWO_SETS, *overrides]))


@pytest.mark.parametrize(
    "override",
    [
        "data.source.shards=s3://elsewhere/gta5",
        "data.source.also.synthia.shards=elsewhere",
        "data.on_error=replace",
        "data.max_bad_share=0.1",
        "data.cache.folder=/local",
        "data.storage.timeout_s=5",
        "data.num_workers=7",
        "stage2.cache.folder=/local",
        "stage2.cache.max_gib=5",
    ],
)
def test_what_only_moves_or_speeds_up_data_may_change_between_attempts(override: str) -> None:
    assert changed(override) == []


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("data.source.also.synthia.weight=3", "data.source.also.synthia.weight: 2.0 -> 3.0"),
        ("data.source.first_percent=50", "data.source.first_percent: 100.0 -> 50.0"),
        ("data.source.keys=k.txt", "data.source.keys:  -> k.txt"),
        ("data.crop_size=[64,64]", "data.crop_size: [512, 512] -> [64, 64]"),
        ("stage2.cache={folder:x,num_samples:8}", "stage2.cache.num_samples: 0 -> 8"),
    ],
)
def test_what_changes_the_samples_may_not(override: str, difference: str) -> None:
    assert changed(override) == [difference]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source.weight=0", r"data.source.weight=0.0 of \S+ must be positive"),
        ("data.source.first_percent=101", r"first_percent=101.0 of \S+ must be in \(0, 100\]"),
        ("+data.source.also={b:{weight:1}}", r"data.source.also.b: every set of a domain needs its shards"),
        ("data.max_bad_share=1", r"data.max_bad_share=1.0 must be at least 0 and below 1; 0.001"),
        ("data.on_error=ignore", r"on_error"),
        ("data.storage.timeout_s=0", r"data.storage.timeout_s=0.0 must be above 0, and finite; 20"),
        ("data.cache.max_gib=0", r"data.cache.max_gib=0.0 must be positive"),
    ],
)
def test_a_bad_data_setting_is_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_config([override])
    assert "\n" not in str(raised.value)


def test_stage_2_is_by_default_the_recipe_that_measured_best_on_the_scenes():
    grid = yaml.safe_load((Path(__file__).parents[1] / "results/scenes/grid.yaml").read_text())
    best = load_config([*grid["common"], *grid["runs"]["s2_residual_corr"]["settings"]])
    config = load_config(["experiment=demo"])
    assert config.stage2.objective == best.stage2.objective
    assert (config.model.latent, config.model.condition) == (best.model.latent, best.model.condition)


@pytest.mark.parametrize("experiment", ["demo", "carla_to_camvid", "gta5_to_cityscapes"])
def test_the_papers_objective_is_one_word_whatever_an_experiment_says(experiment: str) -> None:
    config = load_config([f"experiment={experiment}", "stage2=paper"])
    objective = config.stage2.objective
    assert (config.model.latent, config.model.condition) == (LatentKind.image, ConditionKind.latent)
    assert objective.diffusion_loss is DiffusionLoss.noise and objective.adversary_input is AdversaryInput.noise
    assert objective.pure_noise_share == objective.task_weight == 0 and not objective.deterministic
    assert objective.learning_rate == load_config([f"experiment={experiment}"]).stage2.objective.learning_rate
    assert load_config(["stage2=paper", "stage2.objective.task_weight=2"]).stage2.objective.task_weight == 2
