"""Keep stage 2's views in files of the node, named by all that they depend on."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

from iccld import __version__
from iccld.config import Config, bound_settings
from iccld.data.processes import say
from iccld.data.storage.cache import CacheConfig, SampleCache
from iccld.data.stream.stream import TrainingStream
from iccld.programs.run.hand_off import handed_over
from iccld.runtime.engine.engine import Engine
from iccld.stages.adversarial import AdversarialStage
from iccld.stages.base import Stage
from iccld.stages.view_cache import FORMAT, ViewCache

# Of the settings that a run may not change: those that no view depends on. New ones are taken to matter.
NOT_OF_VIEWS = (
    "stage1.", "stage1_from", "initial_model", "statistics_samples", "stage2.trainer.", "stage2.cache.",
    "model.denoiser.", "model.discriminator.", *(
        f"stage2.objective.{name}"
        for name in (
            "learning_rate", "weight_decay", "discriminator_learning_rate", "teacher_decay", "diffusion_loss",
            "pure_noise_share", "deterministic", "adversarial_weight", "adversarial_ramp_steps", "domain_weights",
            "ema_profile.",
        )
    ),
)  # fmt: skip


class ViewFiles(SampleCache):
    """Entries of megabytes, few: large buckets, which are waited for, in the background."""

    setting, contents, without = "stage2.cache", "views", "views are computed"
    num_buckets = 16
    waits = True


def open_view_files(config: Config) -> ViewFiles:
    """Raises ValueError where the folder cannot be used."""
    return ViewFiles(CacheConfig(config.stage2.cache.folder, config.stage2.cache.max_gib))


@contextmanager
def keep_views(stage: Stage, config: Config, engine: Engine, stream: TrainingStream) -> Iterator[None]:
    """Around a training: stage 2 has its cache, where one is set. Copies made of the stage have none."""
    num_samples = config.stage2.cache.num_samples
    if not isinstance(stage, AdversarialStage) or not num_samples:
        yield
        return
    report = say if engine.ranks.is_main else lambda text: None
    identity = identity_of_views(config, engine, stream)
    stage.view_cache = ViewCache(num_samples, open_view_files(config), identity=identity, report=report)
    yield
    stage.view_cache.finish()
    stage.view_cache = None


def identity_of_views(config: Config, engine: Engine, stream: TrainingStream) -> str:
    """Hash all that views depend on: stage 1's weights, data, settings, and what they are computed with."""
    settings = {key: value for key, value in bound_settings(config).items() if not key.startswith(NOT_OF_VIEWS)}
    what = {
        "format": FORMAT,
        "version": __version__,
        "weights": handed_over(config)[1].model_sha256,
        "data": stream.fingerprints(),
        "settings": settings,
        "device": engine.device.type,
        "precision": engine.accelerator.mixed_precision,
        "compile": config.engine.compile.on(engine.device).name,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
