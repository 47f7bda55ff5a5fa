"""Views are kept under what they depend on, within the folder and the room that the settings give."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from iccld.batch_layout import BatchLayout
from iccld.config import load_config
from iccld.outcome import ToldByRank0
from iccld.programs.run import kept_views
from iccld.programs.run.building import build_stream, noise_of
from iccld.programs.run.kept_views import identity_of_views, keep_views, open_view_files
from iccld.runtime.settings import Compile
from iccld.stages.views import CORRUPTION_NOISE
from tests.factory import scene_overrides
from tests.programs.test_scoring import Two

ENGINE: Any = SimpleNamespace(
    device=SimpleNamespace(type="cpu"),
    accelerator=SimpleNamespace(mixed_precision="no"),
    compile=Compile.none,
    is_main=True,
)


@pytest.fixture
def identity(scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(kept_views, "handed_over", lambda name, config: ("", SimpleNamespace(model_sha256="weights")))

    def of(*overrides: str) -> str:
        config = load_config([*scene_overrides(scene_shards, tmp_path), *overrides])
        return identity_of_views("stage2", config, ENGINE, build_stream("stage2", config, BatchLayout(2, 2)))

    return of


def test_other_code_makes_other_views(identity: Any, monkeypatch: pytest.MonkeyPatch):
    before = identity()
    monkeypatch.setattr(kept_views, "code_hash", lambda: "other")
    assert identity() != before


@pytest.mark.parametrize(
    "override",
    [
        "data.crop_size=[32,64]",
        "data.flip=0",
        "data.target.first_percent=50",
        "seed=1",
        "stage2.objective.photometric.jitter=0.5",
        "engine.precision=bf16",
        "engine.deterministic=true",
        "engine.cudnn_benchmark=false",
        "model.latent=mask",
        "stage2.objective.task_weight=1",
        "stage2.objective.corruption.strength=0.3",
        "stage2.objective.adversary_input=map",
    ],
)
def test_what_changes_the_views_changes_their_names(identity: Any, override: str) -> None:
    assert identity(override) != identity()


@pytest.mark.parametrize(
    "override",
    [
        "stage2.objective.learning_rate=1e-5",
        "stage2.objective.adversarial_weight=0",
        "stage2.objective.pure_noise_share=0.25",
        "stage2.objective.deterministic=true",
        "stage2.trainer.num_steps=7",
        "model.denoiser.width=32",
        "run_dir=elsewhere",
        "data.num_workers=3",
        "stage1.trainer.num_steps=7",
    ],
)
def test_what_does_not_change_them_shares_them(identity: Any, override: str) -> None:
    assert identity(override) == identity()


def test_other_weights_of_stage_1_are_other_views(identity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity()
    monkeypatch.setattr(kept_views, "handed_over", lambda name, config: ("", SimpleNamespace(model_sha256="others")))
    assert identity() != before


def test_files_stay_within_the_room_given(tmp_path: Path) -> None:
    cache = [f"stage2.cache.folder={tmp_path}/views", "stage2.cache.num_samples=8"]
    files = open_view_files("stage2", load_config([*cache, f"stage2.cache.max_gib={2**-6}"]))  # a MiB in each bucket
    assert files is not None
    for number in range(100):
        files.put(str(number), bytes(1 << 19))
    assert files.counters["full"] > 0 and files.counters["too_large"] == 0
    files.put("large", bytes(1 << 20))
    assert files.counters["too_large"] == 1
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) <= 1 << 24
    assert sum(files.get(str(number)) is not None for number in range(100)) == files.counters["puts"] > 10


def test_a_folder_that_cannot_be_used_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"stage2.cache.folder=\S+file cannot be written to"):
        open_view_files("stage2", load_config([f"stage2.cache.folder={tmp_path}/file", "stage2.cache.num_samples=8"]))


def test_the_stream_draws_no_noise_for_views_that_repeat() -> None:
    corrupted = ["stage2.objective.corruption.strength=1"]
    cache = ["stage2.cache.folder=x", "stage2.cache.num_samples=8"]
    plain, cached = (noise_of("stage2", load_config(words)) for words in (corrupted, corrupted + cache))
    assert plain.keys() - cached.keys() == {CORRUPTION_NOISE} and cached


def test_a_period_that_cuts_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_samples=10 must be a multiple of \S+=4; use 12"):
        load_config(["stage2.cache.folder=x", "stage2.cache.num_samples=10", "stage2.trainer.global_batch_size=4"])


def test_what_a_write_of_one_rank_met_is_told_to_all(
    scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_views, "identity_of_views", lambda *_: "identity")
    settings = ["stage2.cache.num_samples=8", f"stage2.cache.folder={tmp_path / 'views'}"]
    config = load_config([*scene_overrides(scene_shards, tmp_path / "run"), *settings])
    ranks, stage = Two(rank=1), SimpleNamespace(name="stage2", view_cache=None)
    engine, stream = SimpleNamespace(ranks=ranks), SimpleNamespace(repeat_after=8)
    with pytest.raises(ToldByRank0), keep_views(stage, config, engine, stream):  # type: ignore[arg-type]
        stage.view_cache = SimpleNamespace(finish=Mock(side_effect=ValueError("not finite")))
    assert [str(error) for error in ranks.gathered] == ["not finite"]
