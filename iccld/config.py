"""The configuration: dataclasses beside the classes they configure, composed from packaged YAML by Hydra."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from iccld.data.config import DataConfig
from iccld.evaluation import EvaluationConfig
from iccld.models.iccld import ModelConfig
from iccld.runtime.engine import EngineConfig
from iccld.runtime.limits import WatchdogConfig
from iccld.runtime.memory import MemoryConfig
from iccld.runtime.metrics import MetricsConfig
from iccld.runtime.preemption import PreemptionConfig
from iccld.stages.adversarial import AdversarialConfig
from iccld.stages.segmentation import SegmentationConfig
from iccld.trainer import TrainerConfig


class StageName(Enum):
    stage1 = "stage1"
    stage2 = "stage2"


class Weights(Enum):
    teacher = "teacher"
    student = "student"


@dataclass
class Stage1Config:
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    objective: SegmentationConfig = field(default_factory=SegmentationConfig)


@dataclass
class Stage2Config:
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(gradient_clip=1.0))
    objective: AdversarialConfig = field(default_factory=AdversarialConfig)


@dataclass
class InferenceConfig:
    """Which weights predict, and with how many denoising steps (0: the decoder alone, as after stage 1)."""

    weights: Weights = Weights.teacher
    num_steps: list[int] = field(default_factory=lambda: [1, 4, 50])
    noise_seeds: int = 1

    def __post_init__(self) -> None:
        if not self.num_steps or min(self.num_steps) < 0 or max(self.num_steps) > 1000:
            raise ValueError(f"inference.num_steps={self.num_steps} must be numbers of denoising steps, 0 to 1000.")
        if self.noise_seeds < 1:
            raise ValueError(f"inference.noise_seeds={self.noise_seeds} must be at least 1.")


@dataclass
class Config:
    """Everything a run is made of. `initial_model`: a model folder whose encoder and decoder stage 1 starts from."""

    run_dir: str = "runs/default"
    seed: int = 0
    stages: list[StageName] = field(default_factory=lambda: [StageName.stage1, StageName.stage2])
    initial_model: str = ""
    preflight: bool = True  # devices, disk, shards and a collective are tried before a run
    statistics_samples: int = 256  # images of each domain over which the latent's mean and std are measured
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    engine: EngineConfig = field(default_factory=EngineConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        if not self.stages or self.stages != [stage for stage in StageName if stage in self.stages]:
            names = [stage.value for stage in self.stages]
            raise ValueError(f"stages={names} must be [stage1], [stage2] or [stage1, stage2]; use stage=all.")
        if self.statistics_samples < 1:
            raise ValueError(f"statistics_samples={self.statistics_samples} must be at least 1; 256 is usual.")


# What may change between two attempts at one run: it divides, speeds up or describes the work, and does not change it.
FREE_SETTINGS = (
    "run_dir", "stages", "metrics.", "evaluation.", "inference.", "data.num_workers", "data.validation.",
    "data.source.shards", "data.target.shards", "data.storage.", "data.cache.", "data.on_error",
    "data.max_bad_share", "engine.compile", "engine.deterministic", "engine.cudnn_benchmark",
    "preemption.", "watchdog.", "preflight", "memory.",
    "stage1.trainer.micro_batch_size", "stage2.trainer.micro_batch_size", "stage1.trainer.checkpoint.",
    "stage2.trainer.checkpoint.", "stage1.trainer.evaluate_every", "stage2.trainer.evaluate_every",
    "model.encoder.activation_checkpointing", "model.denoiser.activation_checkpointing",
)  # fmt: skip


def load_config(overrides: Sequence[str], *, config_dir: str = "") -> Config:
    """Compose the packaged YAML with `key=value` overrides. `config_dir` adds a folder with YAML groups of one's own.

    Raises ValueError for unknown keys, wrong types, and values that a part refuses, in one line.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    if config_dir:
        if not Path(config_dir).is_dir():
            raise ValueError(f"--config-dir {config_dir}: there is no such folder.")
        overrides = [*overrides, f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    try:
        with initialize_config_module("iccld.configs", version_base="1.3"):
            return OmegaConf.to_object(compose("config", overrides=list(overrides)))  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{_one_line(error)} (`iccld config` shows all settings)") from error


def _one_line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = str(cause).split("Config search path")[0]
    return " ".join(line.strip() for line in text.splitlines() if "_type" not in line).strip()


def to_dict(config: Any) -> dict[str, Any]:
    """Plain numbers, strings, lists and dicts, as YAML and JSON have them; enums by name."""
    container = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a run directory, with `key=value` overrides.

    Raises ValueError naming the file where it does not fit the schema.
    """
    try:
        layers = OmegaConf.structured(Config), OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
        return OmegaConf.to_object(OmegaConf.merge(*layers))  # type: ignore[return-value]
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} {' '.join(overrides)}: not the settings of a run ({_one_line(error)}).") from error


def config_from(values: Mapping[str, Any], *, where: str) -> Config:
    """What `to_dict` gave, as the settings it came from. Raises ValueError where they do not fit the schema."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: not the settings of a run ({_one_line(error)}).") from error


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` of every setting that must not differ between two attempts at one run."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    bound = [key for key in changed if not re.sub(r"\.also\.[^.]+\.shards$", ".shards", key).startswith(FREE_SETTINGS)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in bound]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
