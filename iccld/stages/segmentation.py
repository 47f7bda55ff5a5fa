"""Stage 1: encoder and decoder learn from source labels and from ClassMix with an EMA teacher's pseudo-labels.

Method: L1 = CE(D(E(x_src)), y_src) + CE_w(D(E(x_mix)), y_mix). `B C H W` images, `K` classes.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iccld import rng
from iccld.eager import without_compiled_code
from iccld.labels import IGNORE_INDEX
from iccld.losses import feature_distance, weighted_cross_entropy
from iccld.models.encoder import Encoder
from iccld.models.iccld import ICCLD
from iccld.models.latent import channel_moments
from iccld.models.model_card import ModelStage
from iccld.stages import diagnostics
from iccld.stages.base import Stage, StageInputs, StageOutput, decayed_groups, keyed_noise, sum_and_count, to_float
from iccld.stages.kind import StageKind, StageSettings
from iccld.stages.settings import SegmentationConfig, Stage1Config
from iccld.stages.signs import remedies_of_lost_classes
from iccld.uda.classmix import class_mask, paste
from iccld.uda.corruption import corrupt, draw_corruption
from iccld.uda.masking import block_mask
from iccld.uda.photometric import NUM_DRAWS, strong_augment
from iccld.uda.pseudo_labels import PseudoLabels, class_probabilities, kept_labels, pseudo_labels
from iccld.uda.teacher import Teacher

MASK_LATENT_NOISE = "mask latent noise"
"""The purpose of the noise on the mask's latent."""
CORRUPTION_NOISE = "corruption noise"
"""The purpose of the corruption's noise `(3, H, W)`; a sample's source and mixed images share it."""


class SegmentationModule(nn.Module):
    """Trained module of stage 1: E, D and, if the latent is the mask's, M."""

    def __init__(self, model: ICCLD, config: SegmentationConfig) -> None:
        super().__init__()
        self.encoder, self.decoder, self.mask_encoder = model.encoder, model.decoder, model.mask_encoder
        self.config = config

    def forward(self, inputs: StageInputs) -> StageOutput:
        """Compute the losses of source, mixed and (option) masked images in one pass: no layer mixes samples."""
        tensors, denominators = inputs
        names = [name for name in ("source", "mixed", "masked") if f"{name}_images" in tensors]
        encoded = self.encoder(torch.cat([tensors[f"{name}_images"] for name in names]))
        logits = self.decoder(encoded.latent, encoded.features).chunk(len(names))
        losses: dict[str, Tensor] = {}
        for name, own_logits in zip(names, logits, strict=True):
            loss = weighted_cross_entropy(
                own_logits,
                tensors[f"{name}_labels"],
                weights=tensors.get(f"{name}_weights"),
                denominator=denominators[name],
            )
            losses[name] = loss * {"source": 1.0, "mixed": self.config.target_weight}.get(
                name, self.config.masked_weight
            )
        source_features = [features.chunk(len(names))[0] for features in encoded.features]
        losses |= self._reference_loss(tensors, source_features) | self._mask_latent_loss(
            tensors, denominators, source_features
        )
        return StageOutput(losses, _metrics(tensors, dict(zip(names, logits, strict=True))))

    def _reference_loss(self, tensors: dict[str, Tensor], features: list[Tensor]) -> dict[str, Tensor]:
        if "reference_features" not in tensors:
            return {}
        distance = feature_distance(
            features[-1],
            tensors["reference_features"],
            tensors["source_labels"],
            classes=self.config.feature_distance_classes,
        )
        return {"feature_distance": self.config.feature_distance_weight * distance}

    def _mask_latent_loss(
        self, tensors: dict[str, Tensor], denominators: dict[str, Tensor], features: list[Tensor]
    ) -> dict[str, Tensor]:
        if self.mask_encoder is None:
            return {}
        latent = self.mask_encoder(tensors["source_labels"])
        scale = latent.detach().std(dim=(1, 2, 3), keepdim=True)  # one for each sample: the batch may be split
        latent = latent + self.config.mask_latent_noise * scale * tensors["mask_latent_noise"]
        logits = self.decoder(latent, features, keep=tensors["mask_latent_keep"])
        loss = weighted_cross_entropy(
            logits, tensors["source_labels"], weights=None, denominator=denominators["source"]
        )
        return {"mask_latent": self.config.mask_latent_weight * loss}


class SegmentationStage(Stage):
    """Stage 1 of the method; `adapt=False` makes it the source-only baseline."""

    name = "stage1"
    module: SegmentationModule

    def __init__(
        self, model: ICCLD, config: SegmentationConfig, *, seed: int, reference: Encoder | None = None
    ) -> None:
        """Build the stage; `reference` is the published encoder, which the feature distance compares with."""
        self.model, self.config, self.seed, self.num_classes = model, config, seed, model.num_classes
        _check_feature_distance(model, config, reference)
        self.module = SegmentationModule(model, config)
        self.student, self.ema_profile = model, config.ema_profile
        self.first_whole_step = config.warm_start_steps
        self.teacher = Teacher(model, max_decay=config.teacher_decay)
        self.reference = reference.to(model.alpha_bar.device).eval() if reference is not None else None

    def prepare(self, batch: Mapping[str, Any], step: int) -> StageInputs:
        source = batch["source"]
        tensors = {"source_images": to_float(source["images"]), "source_labels": source["labels"]}
        if self.config.adapt and step >= self.config.warm_start_steps:
            tensors |= self._adaptation(source, batch["target"], step)
        if self.reference is not None:
            tensors["reference_features"] = self.reference(tensors["source_images"]).features[-1]
        if self.model.mask_encoder is not None:
            tensors |= self._mask_latent_draws(source)
        labels = {name: tensors.get(f"{name}_labels") for name in ("source", "mixed", "masked")}
        counts = {name: (y != IGNORE_INDEX).sum().float() for name, y in labels.items() if y is not None}
        return StageInputs(tensors, counts)

    def _adaptation(self, source: Mapping[str, Any], target: Mapping[str, Any], step: int) -> dict[str, Tensor]:
        source_images, images, numbers = to_float(source["images"]), to_float(target["images"]), target["numbers"]
        pseudo = self._pseudo_labels(images, target)
        scores = rng.uniform(self.num_classes, seed=self.seed, purpose="classmix", numbers=numbers)
        mask = class_mask(source["labels"], scores)
        labelled = {"source": source_images, "mixed": paste(mask, source_images, images)}
        if step >= self.config.corruption_start:
            labelled = {name: self._corrupted(name, given, source, images) for name, given in labelled.items()}
        draws = rng.uniform(NUM_DRAWS, seed=self.seed, purpose="photometric", numbers=numbers)
        tensors = {
            "source_images": labelled["source"],
            "mixed_images": strong_augment(labelled["mixed"], draws, self.config.photometric),
            "mixed_labels": paste(mask, source["labels"], pseudo.labels),
            "mixed_weights": paste(mask, torch.ones_like(pseudo.weights), pseudo.weights),
            "confident": pseudo.confident,
        }
        if not self.config.target_labels:
            valid = pseudo.labels.masked_fill(~target["valid"], IGNORE_INDEX)
            counts = diagnostics.class_counts(valid, source["labels"], num_classes=self.num_classes)
            tensors |= {diagnostics.CLASSES: counts, "mixed_is_target": diagnostics.thinned(~mask)}
        if self.config.masked_weight:
            draws = rng.uniform(NUM_DRAWS, seed=self.seed, purpose="masked photometric", numbers=numbers)
            augmented = strong_augment(images, draws, self.config.photometric)
            hidden = self.model.encoder.get_buffer("image_mean")  # as in MIC: 0 once E has normalised it
            tensors |= {
                "masked_images": torch.where(self._visible(images, numbers) > 0, augmented, hidden),
                "masked_labels": pseudo.labels,
                "masked_weights": pseudo.weights,
            }
        return tensors

    def _pseudo_labels(self, images: Tensor, target: Mapping[str, Any]) -> PseudoLabels:
        if self.config.target_labels:
            ones = torch.ones_like(target["labels"], dtype=torch.float32)
            return PseudoLabels(target["labels"], ones, ones.mean(dim=(1, 2)))
        predictor = self.teacher.module if self.config.use_teacher else self.model
        return pseudo_labels(
            class_probabilities(predictor.segment, images, flip=self.config.flip_teacher),
            threshold=self.config.confidence_threshold,
            class_thresholds=self.config.class_thresholds,
            image_weight=self.config.image_weight,
            class_balance=self.config.class_balance,
            valid=target["valid"],
        )

    def pseudo_labels_of(self, batch: Mapping[str, Any]) -> Tensor | None:
        if not self.config.adapt or self.config.target_labels:
            return None
        target = batch["target"]
        pseudo = self._pseudo_labels(to_float(target["images"]), target)
        return kept_labels(pseudo, target["valid"], class_thresholds=self.config.class_thresholds)

    def _corrupted(self, name: str, images: Tensor, source: Mapping[str, Any], target_images: Tensor) -> Tensor:
        """Make labelled images more like the target's; the stream pairs source i with target i by their number."""
        config = self.config.corruption
        if not config.strength:
            return images
        noise = keyed_noise(source, CORRUPTION_NOISE, images.shape[1:], seed=self.seed)
        key = {"seed": self.seed, "purpose": f"corruption {name}", "numbers": source["numbers"]}
        return corrupt(images, target_images, draw_corruption(config, noise=noise, **key), config)

    def _visible(self, images: Tensor, numbers: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        rows, columns = -(-height // self.config.masked_block), -(-width // self.config.masked_block)
        draws = rng.uniform(rows * columns, seed=self.seed, purpose="masking", numbers=numbers)
        draws = rng.to_device(draws.view(-1, rows, columns), images.device)
        return block_mask(draws, height=height, width=width, ratio=self.config.masked_ratio)

    def _mask_latent_draws(self, source: Mapping[str, Any]) -> dict[str, Tensor]:
        labels, numbers = source["labels"], source["numbers"]
        shape = self.model.latent_shape(labels.shape[1], labels.shape[2])
        drop = rng.uniform(1, seed=self.seed, purpose="connection drop", numbers=numbers)[:, 0]
        noise = keyed_noise(source, MASK_LATENT_NOISE, shape, seed=self.seed)
        keep = rng.to_device(drop >= self.config.mask_latent_drop, labels.device)
        return {"mask_latent_noise": noise, "mask_latent_keep": keep}

    def param_groups(self) -> list[dict[str, Any]]:
        rest = [(name, p) for name, p in self.module.named_parameters() if not name.startswith("encoder.backbone.")]
        backbone, decay = self.model.encoder.backbone.named_parameters(), self.config.weight_decay
        return [
            *decayed_groups(
                backbone, learning_rate=self.config.encoder_learning_rate, weight_decay=decay, name="encoder"
            ),
            *decayed_groups(rest, learning_rate=self.config.decoder_learning_rate, weight_decay=decay, name="decoder"),
        ]

    def parts(self) -> dict[str, nn.Module]:
        teacher = {f"teacher {name}": part for name, part in self.teacher.module.named_children()}
        return super().parts() | teacher | ({"reference": self.reference} if self.reference is not None else {})

    def assemble_models(self) -> dict[str, ICCLD]:
        return {"teacher": self.teacher.module, "student": self.model}

    @torch.no_grad()
    @without_compiled_code()  # its batches are not the steps'
    def finish(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Measure the latent's mean and std per channel: stage 2 diffuses a latent of unit variance (as in LDM)."""
        models = self.assemble_models()
        moments = {name: list[tuple[Tensor, Tensor]]() for name in models}
        for domain in (domain for batch in batches for domain in batch.values()):
            for name, model in models.items():
                moments[name].append(self._moments(model, domain))
        for name, model in models.items():
            z_0, condition = (torch.stack(of_batches).sum(dim=0) for of_batches in zip(*moments[name], strict=True))
            model.set_latent_statistics(z_0=z_0, condition=condition)

    def _moments(self, model: ICCLD, domain: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        images = to_float(domain["images"])
        encoded = model.encoder(images)
        labels = domain["labels"] if "labels" in domain else model.decode(encoded, images.shape[-2:]).argmax(dim=1)
        draws = rng.uniform(NUM_DRAWS, seed=self.seed, purpose="latent statistics", numbers=domain["numbers"])
        seen = encoded.latent
        if model.config.latent.sees_strong_view:
            seen = model.encoder(strong_augment(images, draws, self.config.photometric)).latent
        return channel_moments(model.encoded_z_0(encoded.latent, labels)), channel_moments(seen)

    def averages(self) -> dict[nn.Module, tuple[str, ...]]:
        return {self.teacher.module: ("segment",)}

    def called_by_prepare(self) -> list[nn.Module]:
        predictor = self.teacher.module if self.config.use_teacher else self.model
        return [part for part in (predictor.encoder, predictor.decoder, self.reference) if part is not None]


def _metrics(tensors: dict[str, Tensor], logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """Measure confident pixels, classes of pseudo-labels, and where the student contradicts the teacher."""
    if "confident" not in tensors:
        return {}
    metrics = {"confident": sum_and_count(tensors["confident"].sum(), len(tensors["confident"]))}
    if diagnostics.CLASSES in tensors:
        metrics[diagnostics.CLASSES] = tensors[diagnostics.CLASSES].float()
        where = tensors["mixed_is_target"]
        metrics[diagnostics.DISAGREEMENT] = diagnostics.disagreement(logits["mixed"], tensors["mixed_labels"], where)
    return metrics


def _check_feature_distance(model: ICCLD, config: SegmentationConfig, reference: Encoder | None) -> None:
    weight, classes = config.feature_distance_weight, config.feature_distance_classes
    if weight and (reference is None or not model.config.encoder.pretrained):
        raise ValueError(
            f"stage1.objective.feature_distance_weight={weight} keeps to published features; "
            f"set model.encoder.pretrained, or the weight to 0."
        )
    if weight and not (classes and all(0 <= c < model.num_classes for c in classes)):
        rule = f"must be class indices below {model.num_classes}, at least one"
        raise ValueError(
            f"stage1.objective.feature_distance_classes={classes} {rule}; name some, or mark your own classes as "
            f"`thing: true`."
        )


class Segmentation(StageKind[Stage1Config]):
    """Stage 1 as the programs see it."""

    name = "stage1"
    saved_as = ModelStage.segmentation

    def build(
        self, settings: StageSettings[Stage1Config], previous: ICCLD | None, *, device: torch.device
    ) -> SegmentationStage:
        model, objective, reference = settings.new_model(with_denoiser=False), settings.own.objective, None
        if settings.is_filled:
            objective = replace(objective, feature_distance_weight=0.0)
        elif objective.feature_distance_weight:
            reference = copy.deepcopy(model.encoder)
        if settings.initial_model and not settings.is_filled:
            _load_initial(model, Path(settings.initial_model))
        return SegmentationStage(model.to(device), objective, seed=settings.seed, reference=reference)

    def check(self, settings: StageSettings[Stage1Config], *, device: torch.device, is_sharded: bool) -> None:
        if is_sharded and not settings.own.objective.use_teacher:
            raise ValueError(
                "stage1.objective.use_teacher=false asks the student for pseudo-labels, which FSDP2 holds in shards; "
                "launch with ddp, zero1 or zero2."
            )

    def reads_target(self, settings: StageSettings[Stage1Config]) -> bool:
        return settings.own.objective.adapt

    def reads_target_labels(self, settings: StageSettings[Stage1Config]) -> bool:
        return settings.own.objective.target_labels

    def noise(self, settings: StageSettings[Stage1Config]) -> dict[str, tuple[int, ...]]:
        objective = settings.own.objective
        noise: dict[str, tuple[int, ...]] = {}
        if settings.model.latent.has_mask_encoder:
            noise[MASK_LATENT_NOISE] = settings.latent_shape
        if objective.adapt and objective.corruption.strength:
            noise[CORRUPTION_NOISE] = (3, *settings.crop_size)
        return noise

    def class_remedies(self, settings: StageSettings[Stage1Config]) -> list[str]:
        return remedies_of_lost_classes(self.name, settings.own.objective)


def _load_initial(model: ICCLD, folder: Path) -> None:
    initial = ICCLD.from_pretrained(folder, num_classes=model.num_classes, with_denoiser=False)
    try:
        model.load_state_dict(initial.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"initial_model={folder} is another model than `model` describes; "
            f"use the model settings that it was trained with. {str(error).splitlines()[1].strip()}"
        ) from error
