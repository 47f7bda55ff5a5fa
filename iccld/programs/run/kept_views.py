"""Keep a stage's views in files of the node, named by all that they depend on."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from iccld.config import Config, bound_settings, stage_settings
from iccld.data.processes import say
from iccld.data.storage.cache import CacheConfig, SampleCache
from iccld.data.stream.stream import TrainingStream
from iccld.programs.run.hand_off import handed_over
from iccld.runtime.engine.device import device_name
from iccld.runtime.engine.engine import Engine
from iccld.runtime.ranks import together
from iccld.slurm.snapshot import code_hash
from iccld.stages.base import Stage
from iccld.stages.table import STAGES
from iccld.stages.view_cache import FORMAT, ViewCache


class ViewFiles(SampleCache):
    """Files of few entries of megabytes each: buckets are large, and the background waits for them."""

    contents, without = "views", "views are computed"
    num_buckets = 16
    waits = True

    def __init__(self, config: CacheConfig, *, setting: str) -> None:
        """Open the files; `setting` is the section of the settings that messages name."""
        self.setting = setting
        super().__init__(config)


def open_view_files(name: str, config: Config) -> ViewFiles | None:
    """Open the files of a stage's cache, if it has one. Raises ValueError if the folder cannot be used."""
    cache = STAGES[name].cache(stage_settings(name, config))
    if cache is None or not cache.num_samples:
        return None
    return ViewFiles(CacheConfig(cache.folder, cache.max_gib), setting=f"{name}.cache")


@contextmanager
def keep_views(stage: Stage, config: Config, engine: Engine, stream: TrainingStream) -> Iterator[None]:
    """Give a stage its cache within the block, if one is set. Copies made of the stage have none."""
    files = open_view_files(stage.name, config)
    if files is None:
        yield
        return
    report = say if engine.ranks.is_main else lambda text: None
    identity = identity_of_views(stage.name, config, engine, stream)
    stage.view_cache = ViewCache(stream.repeat_after, files, identity=identity, report=report)
    yield
    together(stage.view_cache.finish, engine.ranks)
    stage.view_cache = None


def identity_of_views(name: str, config: Config, engine: Engine, stream: TrainingStream) -> str:
    """Hash all that a stage's views depend on: the weights it starts from, data, settings, what computes them."""
    kind = STAGES[name]
    without = (*kind.settings_of_no_view, *(f"{other}." for other in STAGES if other != name))
    settings = {key: value for key, value in bound_settings(config).items() if not key.startswith(without)}
    what = {
        "format": FORMAT,
        "code": code_hash(),
        "weights": handed_over(kind.previous, config)[1].model_sha256 if kind.previous else config.initial_model,
        "data": stream.fingerprints(),
        "settings": settings,
        "device": device_name(engine.device),
        "precision": engine.accelerator.mixed_precision,
        "compile": engine.compile.name,
        "kernels": [torch.__version__, config.engine.deterministic, config.engine.cudnn_benchmark],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
