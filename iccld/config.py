"""The configuration: dataclasses of all wings, composed from packaged YAML by Hydra.

They stand in the `settings.py` of their wing, in iccld/settings.py or in data/. None imports torch, so that `iccld
config` starts at once.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from iccld import plain_yaml, schema, suggestions
from iccld.batch_layout import BatchLayout
from iccld.data.config import DataConfig, refuse_storage_of_files
from iccld.data.storage.base import StorageConfig
from iccld.group_files import own_files, place_of, refuse_packaged_names, remedy_of
from iccld.models.settings import ModelConfig
from iccld.plain_hydra import OwnGroups, beside_other_hydras, without_resolvers
from iccld.ranges import at_least, check_ranges
from iccld.redact import redacted
from iccld.runtime.settings import EngineConfig, MemoryConfig, MetricsConfig, PreemptionConfig, WatchdogConfig
from iccld.settings import EvaluationConfig, TrainerConfig
from iccld.stages.settings import InferenceConfig, SegmentationConfig, Stage1Config, Stage2Config
from iccld.stages.table import STAGES, first_stage

if TYPE_CHECKING:
    from iccld.stages.kind import StageSettings


@dataclass
class Config:
    """Settings of a run.

    `initial_model`: a model folder whose encoder and decoder stage 1 starts from.
    `stage1_from`: the run directory whose finished stage 1 this run copies, to train stage 2 alone.
    """

    run_dir: str = "runs/default"  # the folder that gets everything a run writes
    seed: int = 0  # the seed of every random draw
    stages: list[str] = field(default_factory=lambda: [*STAGES])
    """The stages that this run trains."""
    initial_model: str = ""  # a model folder whose encoder and decoder stage 1 starts from
    stage1_from: str = ""  # a run directory whose finished stage 1 this run takes
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
        if not self.stages or self.stages != [name for name in STAGES if name in self.stages]:
            near = "".join(suggestions.did_you_mean(name, STAGES) for name in self.stages if name not in STAGES)
            raise ValueError(
                f"stages={self.stages} must be some of [{', '.join(STAGES)}], in this order; use stage=all{near or '.'}"
            )
        if self.stage1_from and first_stage() in self.stages:
            raise ValueError(
                f"stage1_from={self.stage1_from} takes stage 1 from another run, which stages must not train; "
                f"use stages=[stage2]."
            )
        self._default_to_things()
        check_ranges(self, "", statistics_samples=at_least(1, "256 is usual"))

    def _default_to_things(self) -> None:
        """Let the feature distance of own or merged classes cover their things, unless the setting names classes."""
        objective, usual = self.stage1.objective, SegmentationConfig()
        if self.data.class_set.names and objective.feature_distance_classes == usual.feature_distance_classes:
            objective.feature_distance_classes = list(self.data.class_set.build().things)


# What may change between two attempts at one run: it divides, speeds up or describes the work, and does not change it.
FREE_SETTINGS = (
    "run_dir", "stages", "metrics.", "evaluation.", "inference.", "data.num_workers", "data.validation.",
    "data.source.shards", "data.target.shards", "data.storage.", "data.cache.", "data.on_error",
    "data.max_bad_share", "data.class_set.colors", "engine.compile", "engine.deterministic", "engine.cudnn_benchmark",
    "preemption.", "watchdog.", "preflight", "memory.",
    "model.encoder.activation_checkpointing", "model.denoiser.activation_checkpointing",
)  # fmt: skip
FREE_OF_A_STAGE = ("trainer.micro_batch_size", "trainer.checkpoint.", "trainer.evaluate_every")
"""Such settings of each stage's section; a stage adds its own (`StageKind.free_settings`)."""


def trainer_settings(name: str, config: Config) -> TrainerConfig:
    """Return the length, batch and cadences of the stage of this name."""
    return getattr(config, name).trainer


def layout_of(name: str, config: Config, *, world_size: int, rank: int = 0) -> BatchLayout:
    """Divide the batch of the stage of this name among ranks. Raises ValueError, which names the setting."""
    try:
        return trainer_settings(name, config).layout(world_size=world_size, rank=rank)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def stage_settings(name: str, config: Config) -> "StageSettings[Any]":
    """Return what the stage of this name sees of the settings."""
    from iccld.stages.kind import StageSettings  # needs torch, as stages do

    return StageSettings(
        own=getattr(config, name),
        model=config.model,
        seed=config.seed,
        num_classes=config.data.class_set.build().num_classes,
        crop_size=config.data.crop_size,
        initial_model=config.initial_model,
    )


def load_config(overrides: Sequence[str], *, config_dir: str = "", are_typed: bool = True) -> Config:
    """Compose the packaged YAML with `key=value` overrides. `config_dir` adds a folder with YAML groups of one's own.

    `are_typed`: the user has typed the overrides, and no file holds them (see `refuse_storage_of_files`).
    The text after the first `=` of a setting that is a string is its value, to the letter. Raises ValueError for
    unknown keys, wrong types, broken files and values that a part refuses, in one line.
    """
    _register_schema(Config)
    parsed, folder = _parsed(overrides), Path(config_dir)
    words = [override.input_line for override in parsed]
    files: list[Path] = []
    if any(override.key_or_group == "hydra.searchpath" for override in parsed):
        raise ValueError("hydra.searchpath: settings of your own are in one folder; use --config-dir FOLDER.")
    if config_dir:
        if not folder.is_dir():
            raise ValueError(f"--config-dir {config_dir}: there is no such folder.")
        path = QuotedString(f"{OwnGroups.scheme()}://{folder.resolve()}", Quote.single)  # taken as it is, `${...}` too
        words.append(f"hydra.searchpath=[{path.with_quotes()}]")
        refuse_packaged_names(folder)
        files = own_files(folder, [(override.key_or_group, override.value()) for override in parsed])
    try:
        with (
            beside_other_hydras(),
            initialize_config_module("iccld.configs", version_base="1.3"),
            without_resolvers(),  # last: Hydra has brought its own
        ):
            composed: Any = compose("config", overrides=words)  # type: ignore[arg-type]
            for key in schema.unknown_keys(composed, Config):  # Hydra adds what `+key` names, known or not
                near = suggestions.for_key(key, Config)
                raise ValueError(f"{key}: there is no such setting{near} (`iccld config` shows all settings)")
            config = _built(composed)
            refuse_storage_of_files(config.data.storage, _storage_of(parsed if are_typed else []))
        config.inference.refuse_no_denoising(config.stages)
        return config
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError, RecursionError) as error:
        text = _one_line(error)
        where = place_of(text, folder, files) if config_dir else ""
        remedy = remedy_of(text, where) or suggestions.for_message(text, Config)
        raise ValueError(f"{where}{text}{remedy} (`iccld config` shows all settings)") from error


def _storage_of(parsed: Sequence[Override]) -> StorageConfig:
    """Return the settings of the storage that these words alone give."""
    data = OmegaConf.create({"data": _schema(DataConfig)})
    for override in parsed:
        key, value = override.key_or_group, override.value()
        if not re.fullmatch(r"data(\.storage(\..*)?)?", key) or override.is_delete():
            continue
        if key in ("data", "data.storage") and not isinstance(value, dict):  # a file, whose settings do not count
            continue
        OmegaConf.update(data, key, value, merge=True)
    return OmegaConf.to_object(data.data.storage)  # type: ignore[return-value]


@lru_cache(maxsize=1)  # it takes a third of a composition's time
def _register_schema(settings: type) -> None:
    ConfigStore.instance().store(name="iccld_schema", node=settings)
    OwnGroups.introduce(settings)


def _built(settings: Any) -> Config:
    """Return the settings as dataclasses. Raises ValueError with the whole path of a setting that a section refuses."""
    try:
        return OmegaConf.to_object(settings)  # type: ignore[return-value]
    except OmegaConfBaseException:
        raise
    except ValueError as error:
        raise ValueError(_with_path(str(error), *_refusing(settings))) from error


def _refusing(node: Any, path: str = "") -> tuple[str, Any]:
    """Return the path of the innermost section that refuses its settings, and the section."""
    sections = {key: node[key] for key in node if OmegaConf.is_dict(node._get_node(key)) and node[key] is not None}
    for key, section in sections.items():
        try:
            OmegaConf.to_object(section)
        except ValueError:
            return _refusing(section, f"{path}.{key}" if path else str(key))
    return path, node


def _with_path(message: str, path: str, section: Any) -> str:
    """Put the whole path into a section's message, which names a setting by the end of its path."""
    parts = path.split(".") if path else []
    for i in range(len(parts)):
        if message.startswith(".".join(parts[i:]) + "."):
            return ".".join([*parts[:i], message])
    names_own = re.split(r"[=.:]", message, maxsplit=1)[0] in section
    return ".".join([*parts, message]) if names_own else message


def _parsed(words: Sequence[str]) -> list[Override]:
    """Parse the overrides as Hydra does. Raises ValueError for what it cannot read, or would read as something else."""
    found = []
    for word in words:
        override = _override(word)
        if override.is_sweep_override():
            raise ValueError(
                f"{word} gives several values; give one, or a list, as [a,b]; `iccld train --multirun` trains a run "
                f"for each value."
            )
        given, key = override.value(), override.key_or_group
        if isinstance(given, list | dict):
            for name, value in schema.not_strings(given, schema.type_at(Config, key), key):
                raise ValueError(f"{word}: {name}={value!r} must be text; put it into quotes, as in '{value}'.")
        found.append(override)
    return found


def swept_values(word: str) -> list[str]:
    """Return `key=value` for each value of a word that gives several, in Hydra's grammar; [] for any other word.

    Raises ValueError for what cannot be read, and for values that are drawn or found, as by `interval` or `glob`.
    """
    override = _override(word)
    if not override.is_sweep_override():
        return []
    values: list[str] = []
    with contextlib.suppress(HydraException):  # `glob` asks for files
        values = [*override.sweep_string_iterator()] if override.is_discrete_sweep() else []
    if not values:
        raise ValueError(f"{word}: its values must be told; use a,b or range(0,3).")
    return [f"{override.get_key_element()}={value}" for value in values]


def _override(word: str) -> Override:
    """Parse one word as Hydra does; the value of a text setting is taken to the letter. Raises ValueError."""
    literal = schema.string_setting(word, Config)
    try:
        return OverridesParser.create().parse_override(
            f"{literal[0]}{literal[1]}={_quoted(literal[2])}" if literal else word
        )
    except HydraException as error:
        raise ValueError(
            f"{word}: no key=value that can be read ({str(error).splitlines()[0]}); text within [...] or {{...}}, "
            f"and a group's choice, that holds more than letters, digits and /-.+@%_ is put into quotes."
        ) from error


def _quoted(text: str) -> str:
    """Quote the text so that Hydra's grammar takes it to the letter."""
    return QuotedString(_as_it_is(text), Quote.single).with_quotes()


def _as_it_is(value: Any) -> Any:
    """Protect plain values from OmegaConf, which would interpret `${...}`."""
    if isinstance(value, str):
        schema.check_text(value, where="a setting")
        return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", value)
    if isinstance(value, Mapping):
        return {key: _as_it_is(item) for key, item in value.items()}
    return [_as_it_is(item) for item in value] if isinstance(value, list) else value


def _one_line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, YAMLError):
        return f"{getattr(getattr(error, 'problem_mark', None), 'name', '')}{plain_yaml.explain(error)}"
    text = str(cause).split("Config search path")[0]
    lines = (line.strip() for line in text.splitlines())
    return " ".join(line for line in lines if not line.startswith(("object_type=", "reference_type="))).strip()


def to_dict(config: Any) -> dict[str, Any]:
    """Return plain numbers, strings, lists and dicts, for YAML and JSON; enums by name; no secrets (`redact`)."""
    return redacted(_plain(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def to_yaml(config: Config) -> str:
    """Write the settings as `read_config` reads them."""
    return plain_yaml.to_yaml(to_dict(config))


def read_config(
    path: Path, overrides: Sequence[str] = (), *, keep: Callable[[Any], Any] = lambda values: values
) -> Config:
    """Read the settings of a run directory's file, which are plain data, with `key=value` overrides.

    `keep` gives what is kept of the file's values, before the overrides. Raises ValueError, which names the file, if it
    does not fit the schema.
    """
    try:
        values = plain_yaml.read_yaml(path)
    except OSError as error:
        raise ValueError(f"{path}: not the settings of a run ({error}).") from error
    return config_from(keep(values), where=" ".join([str(path), *overrides]), overrides=overrides)


def config_from(values: Any, *, where: str, overrides: Sequence[str] = ()) -> Config:
    """Rebuild the settings from what `to_dict` gave, also after YAML or JSON, with `key=value` overrides.

    Nothing in the values is interpreted. Raises ValueError if they do not fit the schema.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: not the settings of a run (no `key: value` lines).")
    for key, value in schema.misplaced(values, Config):
        raise ValueError(f"{where}: not the settings of a run ({key} cannot be {str(value)[:80]!r}).")
    if unknown := [name for name in values.get("stages", ()) if name not in STAGES]:
        raise ValueError(f"{where}: not the settings of a run (stages={unknown} must be some of {[*STAGES]}).")
    parsed = _parsed(overrides)
    try:
        plain = _as_it_is(schema.with_typed_keys(_of_this_version(values), Config))
        config = OmegaConf.merge(_schema(Config), plain)
        with without_resolvers():
            for override in parsed:
                if override.is_delete() or not re.fullmatch(r"[\w.$-]+", override.get_key_element().lstrip("+")):
                    raise ValueError(
                        f"{override.input_line}: settings that are saved take key=value, and nothing else."
                    )
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
            return _built(config)
    except OmegaConfBaseException as error:
        text = _one_line(error)
        near = suggestions.for_message(text, Config)
        raise ValueError(f"{where}: not the settings of a run ({text}{near}).") from error


@cache
def _schema(section: type) -> Any:
    """Return OmegaConf's form of the defaults, which takes a fifth of a second to make. `merge` copies it."""
    return OmegaConf.structured(section)


def _of_this_version(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return saved values in this version's terms: earlier ones lack some, and had a boolean `engine.compile`."""
    values = schema.with_values_when_absent(values, Config)
    engine = values.get("engine")
    if not isinstance(engine, Mapping) or not isinstance(engine.get("compile"), bool):
        return values
    return {**values, "engine": {**engine, "compile": "whole" if engine["compile"] else "none"}}


def differences(old: Config, new: Config) -> list[str]:
    """Return `key: old -> new` of every setting that must not differ between two attempts at one run."""
    before, after = bound_settings(old), bound_settings(new)
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in changed]


def bound_settings(config: Config) -> dict[str, Any]:
    """Return the settings, by their keys, that must not differ between two attempts at one run."""
    of_stages = (f"{k.name}.{setting}" for k in STAGES.values() for setting in (*FREE_OF_A_STAGE, *k.free_settings))
    free = (*FREE_SETTINGS, *of_stages)
    return {
        key: value
        for key, value in schema.flat(to_dict(config)).items()
        if not re.sub(r"\.also\.[^.]+\.shards$", ".shards", key).startswith(free)
    }
