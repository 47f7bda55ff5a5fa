"""Tensors by name, as `StageInputs` and a cache hold them, and the structures that they stand for."""

from torch import Tensor

from iccld.models.condition import ConditionParts
from iccld.models.encoder import EncoderOutput

Tensors = dict[str, Tensor]


def encoded_to_tensors(encoded: EncoderOutput, name: str) -> Tensors:
    """Name E's output: `NAME_latent` and `NAME_features_0` to `_3`."""
    features = {f"{name}_features_{i}": level for i, level in enumerate(encoded.features)}
    return {f"{name}_latent": encoded.latent} | features


def tensors_to_encoded(tensors: Tensors, name: str) -> EncoderOutput:
    """Invert `encoded_to_tensors`."""
    features = sorted(key for key in tensors if key.startswith(f"{name}_features_"))
    return EncoderOutput(tensors[f"{name}_latent"], tuple(tensors[key] for key in features))


def condition_to_tensors(condition: Tensor | ConditionParts) -> Tensors:
    """Name a condition: `condition`; a rich one also has `condition_features_0` to `_2`, `_classes` and `_images`."""
    if isinstance(condition, Tensor):
        return {"condition": condition}
    features = {f"condition_features_{i}": level for i, level in enumerate(condition.features)}
    rest = {"condition_classes": condition.probabilities, "condition_images": condition.images}
    return {"condition": condition.latent} | features | rest


def tensors_to_condition(tensors: Tensors) -> Tensor | ConditionParts:
    """Invert `condition_to_tensors`."""
    if "condition_classes" not in tensors:
        return tensors["condition"]
    features = [tensors[key] for key in sorted(tensors) if key.startswith("condition_features_")]
    return ConditionParts(tensors["condition"], features, tensors["condition_classes"], tensors["condition_images"])
