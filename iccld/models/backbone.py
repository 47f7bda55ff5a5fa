"""Backbones of `transformers`, built or loaded, without random layers. Only this file imports the library."""

import contextlib
import difflib
import functools
import inspect
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iccld.durable import locked, make_folder
from iccld.models.model_card import CARD_NAME, MAX_BYTES, check_sizes
from iccld.models.settings import EncoderConfig
from iccld.outcome import Interrupted
from iccld.reading import MIB, read_json
from iccld.texts import short

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

KNOWN_TYPES = "segformer, convnextv2, swin, mobilenet_v2, dinov2, dinov3_vit"

SELF_CONTAINED = {
    "convnext", "convnextv2", "cvt", "dinov2", "dinov2_with_registers", "dinov3_convnext", "dinov3_vit",
    "efficientnet", "focalnet", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2",
    "poolformer", "pvt_v2", "regnet", "resnet", "segformer", "swiftformer", "swin", "swinv2",
}  # fmt: skip
"""Types that give feature maps, and whose config alone says what is built: a saved model is rebuilt from it.

Others name models and code that are then fetched from the hub.
"""
LEADS_ELSEWHERE = {"auto_map", "backbone", "quantization_config", "use_timm_backbone", "use_pretrained_backbone"}
NOTES = {"_name_or_path", "_commit_hash", "_attn_implementation_autoset"}
"""Notes of transformers in the configs that it saves; nothing needs them."""


def make_backbone(pretrained: str, backbone_config: dict[str, Any]) -> "tuple[PreTrainedModel, set[str]]":
    """Return the backbone in float32, without dropout, and the names of weights that `pretrained` lacks.

    Raises ValueError, and Interrupted if the hub does not answer.
    """
    if bool(pretrained) == bool(backbone_config):
        raise ValueError(
            f"model.encoder.pretrained={pretrained!r} and backbone_config={backbone_config}: "
            f"set exactly one, a hub id or folder with weights, or a transformers config to build without weights."
        )
    from transformers import AutoModel  # importing it takes seconds, so only a built backbone imports it

    if not pretrained:
        config = _config_from_dict(backbone_config, where="model.encoder.backbone_config")
        return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False), set()
    try:
        with _without_progress_bars():
            model, report = _load(pretrained)
    except (OSError, ValueError, RuntimeError) as error:
        if not Path(pretrained).is_dir() and _is_away(error):
            raise Interrupted(
                f"model.encoder.pretrained={pretrained!r}: the hub does not answer ({_first_line(error)}); give the "
                f"same command again, or load it once where there is a network: the copy is then found."
            ) from error
        raise ValueError(
            f"model.encoder.pretrained={pretrained!r} cannot be loaded: {error} Give the hub id of a published "
            f"backbone ({KNOWN_TYPES}) and network access, or a folder with its config.json and model.safetensors."
        ) from error
    if report["unexpected_keys"]:
        logger.warning("%s: left out weights of %s", pretrained, sorted(report["unexpected_keys"]))
    return model.float(), set(report["missing_keys"])


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Let transformers show none: the weights load in milliseconds, and every rank would print one."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    was_enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            enable_progress_bar()


def warn_of_other_normalisation(config: EncoderConfig) -> None:
    """Warn if the folder of a backbone says that it was trained on images of another mean or deviation."""
    path = Path(config.pretrained) / "preprocessor_config.json"
    if not config.pretrained or not path.is_file():
        return
    try:
        preprocessor = dict(read_json(path, MIB))
    except (ValueError, TypeError, OSError):
        return
    if preprocessor.get("do_rescale") is False:  # its figures are of another range
        return
    if preprocessor.get("do_normalize") is False:
        preprocessor |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    for name in ("image_mean", "image_std"):
        own, its = getattr(config, name), preprocessor.get(name)
        if isinstance(its, list) and len(its) == 3 and its != own:
            _warn_once(f"model.encoder.{name}={own}, but by {path} the backbone was trained with {short(its)}; set it")


@functools.cache
def _warn_once(what: str) -> None:
    logger.warning("%s", what)


def _load(pretrained: str) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """Load a folder, or the user's copy of what the hub has: one process fetches it, and the others find it.

    A hub limits requests, and every rank builds its model several times.
    """
    if Path(pretrained).is_dir():
        return _read(pretrained, only_local=True)
    with contextlib.suppress(OSError, ValueError):
        return _read(pretrained, only_local=True)
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ValueError):  # without the lock each process fetches, which is slower
            stack.enter_context(locked(make_folder(cache / ".locks", within=cache) / f"iccld.{os.getuid()}.lock"))
        with contextlib.suppress(OSError, ValueError):
            return _read(pretrained, only_local=True)
        return _read(pretrained, only_local=False)


def _read(pretrained: str, *, only_local: bool) -> "tuple[PreTrainedModel, dict[str, Any]]":
    from transformers import AutoModel

    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")  # each build would ask the hub for a conversion
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": only_local}
    config = _read_config(pretrained, options)
    return AutoModel.from_pretrained(
        pretrained,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        use_safetensors=True if Path(pretrained).is_dir() else None,  # not every published backbone has them
        **options,
    )


def _read_config(pretrained: str, options: dict[str, Any]) -> "PreTrainedConfig":
    """Read and check the config before anything is built of it: anyone may have made a folder, or what a hub has."""
    from transformers import PreTrainedConfig

    where = f"{pretrained}: {CARD_NAME}"
    if Path(pretrained).is_dir():
        values = read_json(Path(pretrained) / CARD_NAME, MAX_BYTES)
    else:
        values, _ = PreTrainedConfig.get_config_dict(pretrained, **options)
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold one JSON object.")
    _refuse_others(values.get("model_type"))
    check_sizes(values, where=where)
    return _config_from_dict({"transformers_version": "unknown", **values}, where=where)


def _is_away(error: BaseException) -> bool:
    """Tell whether the hub, or the way to it, failed; an answer that there is no such model is none."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    causes: list[BaseException] = [error]
    while further := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(further)
    responses = [cause.response for cause in causes if isinstance(cause, HfHubHTTPError)]
    answers = [response.status_code for response in responses if response is not None]
    if answers or HF_HUB_OFFLINE:
        return any(status == 429 or status >= 500 for status in answers)
    of_http = HfHubHTTPError.__bases__[0]  # the base of all errors of the library that the hub's client uses
    return any(isinstance(cause, (of_http, LocalEntryNotFoundError, ConnectionError, TimeoutError)) for cause in causes)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _config_from_dict(values: dict[str, Any], *, where: str) -> "PreTrainedConfig":
    fields = {key: value for key, value in values.items() if key not in NOTES}
    if leads := sorted(k for k in fields if k in LEADS_ELSEWHERE or k.startswith("_") or "_implementation" in k):
        raise ValueError(f"{where} has {', '.join(leads)}, which could fetch code; leave it out.")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = _without_randomness(AutoConfig.for_model(fields.pop("model_type"), **fields))
    except KeyError:
        raise ValueError(f"{where}={short(values)} needs a model_type: one of {KNOWN_TYPES}.") from None
    except (ValueError, TypeError, StrictDataclassError) as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}={short(values)} is no transformers config: {what}") from error
    _refuse_others(config.model_type)
    if "transformers_version" not in fields:  # a saved config may be another version's
        _refuse_misspelt(fields, config)
    return config


def _refuse_misspelt(fields: dict[str, Any], config: "PreTrainedConfig") -> None:
    """Raise ValueError for a field that the type has under another name; transformers would keep it and not read it.

    Other fields that it has not stay: published configs have such.
    """
    known = {*type(config)().to_dict(), *config.attribute_map}
    near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.85) for name in sorted(fields.keys() - known)}
    if meant := [f"{name!r}; did you mean {names[0]}?" for name, names in near.items() if names]:
        raise ValueError(f"model.encoder.backbone_config: {config.model_type} has no {', and no '.join(meant)}")


def _refuse_others(model_type: Any) -> None:
    if model_type not in [*SELF_CONTAINED]:  # a list: what a stranger wrote need not be hashable
        raise ValueError(
            f"model.encoder: a saved model with a backbone of type {short(model_type)} could not be loaded again; "
            f"use one of {', '.join(sorted(SELF_CONTAINED))}."
        )


def _without_randomness(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Turn off dropout, drop-path and DINOv3's jittered positions: they draw from the global generator."""
    for name, value in config.to_dict().items():
        if "drop" in name and (zero := _zero(value)) is not None:
            setattr(config, name, zero)
        if name in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"):
            setattr(config, name, None)
    return config


def _zero(value: Any) -> Any:
    """Return zero for a number, a list of zeros for a list of numbers, and None for anything else."""
    if isinstance(value, list | tuple) and all(_zero(item) is not None for item in value):
        return [_zero(item) for item in value]
    return type(value)(0) if isinstance(value, int | float) and not isinstance(value, bool) else None


def refuse_missing(pretrained: str, missing: list[str]) -> None:
    """Raise ValueError if there are any missing weights; `missing` has their names."""
    if missing:
        raise ValueError(
            f"model.encoder.pretrained={pretrained!r} lacks {len(missing)} of the backbone's weights "
            f"({', '.join(missing[:3])}, ...); they would stay random. Give the whole backbone's folder or hub id."
        )


def recompute_layers(backbone: "PreTrainedModel") -> None:
    """Let the backward pass of a trained backbone recompute its layers. Raises ValueError if it cannot."""
    if not backbone.supports_gradient_checkpointing:
        raise ValueError(
            f"model.encoder.activation_checkpointing=true: a backbone of type {backbone.config.model_type!r} cannot "
            f"recompute its layers; set it to false."
        )
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})  # no layer draws, so there is no state to save


def record_hidden_states_alone(backbone: "PreTrainedModel") -> None:
    """Install the hooks that record a backbone's outputs, and keep those of hidden states alone.

    The encoder asks for nothing that the others record, and a compiled layer breaks into several graphs at each.
    """
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    maybe_install_capturing_hooks(backbone)  # as its first pass would
    for module in backbone.modules():
        for number, hook in list(module._forward_hooks.items()):
            is_recorder = getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
            if is_recorder and inspect.getclosurevars(hook).nonlocals.get("key") != "hidden_states":
                del module._forward_hooks[number]
