"""Views of stage 2, made by the frozen networks: a step's images, their encodings, and the targets of prediction.

    source, target, mixed ── clean view ── E ── z_0 (reading `image`), pseudo-labels of the target
                          └─ corrupted, strongly augmented view ── E ── condition, features for D

Views depend on the samples' numbers alone, and on no step, except for pseudo-labels of the denoiser's average.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iccld import rng
from iccld.labels import IGNORE_INDEX
from iccld.models.denoiser import Denoiser
from iccld.models.encoder import EncoderOutput
from iccld.models.iccld import ICCLD
from iccld.stages.base import keyed_noise, to_float
from iccld.stages.diagnostics import CLASSES, class_counts
from iccld.stages.domains import LABELLED, Images, Labels, encoded_of, joined, mixed_images, mixed_labels, of_domains
from iccld.stages.named import Tensors, condition_to_tensors, encoded_to_tensors, tensors_to_encoded
from iccld.stages.settings import DOMAINS, AdversarialConfig, PseudoLabelSource
from iccld.stages.target_labels import target_probabilities, unmirrored
from iccld.uda.corruption import corrupt, draw_corruption
from iccld.uda.photometric import NUM_DRAWS, strong_augment
from iccld.uda.pseudo_labels import PseudoLabels, kept_labels, pseudo_labels

CORRUPTION_NOISE = "stage2 corruption noise"
LABEL_NOISE = ("pseudo-label noise", "mirrored pseudo-label noise")


@dataclass
class Views:
    """Makes the views with E, D and M of `model`."""

    model: ICCLD
    config: AdversarialConfig
    seed: int

    @property
    def need_labels(self) -> bool:
        """Tell whether z_0 or a loss is made of labels."""
        return self.model.config.latent.is_of_labels or self.config.task_weight > 0

    @property
    def are_labelled_by_denoiser(self) -> bool:
        return self.need_labels and self.config.pseudo_labels is PseudoLabelSource.denoiser

    def __call__(self, batch: Mapping[str, Any]) -> Tensors:
        """Make the views: `condition` and its parts; `seen_latent` and `seen_features_0` to `_3` if something needs D.

        The result also holds the output of `_targets`. If the denoiser labels the target, it holds what
        `with_denoiser_labels` makes that of, instead.
        """
        images = mixed_images(batch, self.uniform(self.model.num_classes, "classmix", batch["target"]["numbers"]))
        seen_images = self._seen_images(batch, images)
        clean, seen, target = self._encoded(batch, images, seen_images)
        tensors = condition_to_tensors(self.model.condition_of(seen, seen_images))
        if self.config.decodes or self.are_labelled_by_denoiser:
            tensors |= encoded_to_tensors(seen, "seen")
        clean_latent = None if clean is None else clean.latent
        if target is None:
            return tensors | self._targets(batch, images.pasted, clean_latent, seen, None)
        if self.are_labelled_by_denoiser:
            kept = {"pasted": images.pasted} | ({} if clean_latent is None else {"clean_latent": clean_latent})
            return tensors | kept | encoded_to_tensors(target, "target")
        probabilities = target_probabilities(self.model, target, self._target_images(batch))
        probabilities = unmirrored(probabilities, len(images.pasted))
        return tensors | self._targets(batch, images.pasted, clean_latent, seen, probabilities)

    def with_denoiser_labels(self, batch: Mapping[str, Any], tensors: Tensors, denoiser: Denoiser) -> Tensors:
        """Replace what `__call__` left for it by the output of `_targets`, with the denoiser's part in the labels."""
        target = tensors_to_encoded(tensors, "target")
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("target_")}
        pasted, clean_latent = rest.pop("pasted"), rest.pop("clean_latent", None)
        noise = self._label_noise(batch, target.latent)
        found = target_probabilities(self.model, target, self._target_images(batch), denoiser=denoiser, noise=noise)
        seen = tensors_to_encoded(rest, "seen")
        return rest | self._targets(batch, pasted, clean_latent, seen, unmirrored(found, len(pasted)))

    def pseudo_labels_of(self, batch: Mapping[str, Any], denoiser: Denoiser) -> Tensor:
        """Return the pseudo-labels of the target images, `(B, H, W)` uint8, also if no loss takes labels.

        255 marks a pixel that is left out.
        """
        images = self._target_images(batch)
        encoded, of_denoiser = self.model.encoder(images), {}
        if self.are_labelled_by_denoiser:
            of_denoiser = {"denoiser": denoiser, "noise": self._label_noise(batch, encoded.latent)}
        found = target_probabilities(self.model, encoded, images, **of_denoiser)
        pseudo = self._pseudo_labels(batch, unmirrored(found, len(batch["target"]["images"])))
        return kept_labels(pseudo, batch["target"]["valid"], class_thresholds=self.config.class_thresholds)

    def _label_noise(self, batch: Mapping[str, Any], latent: Tensor) -> Tensor:
        """Return the noise from which the denoiser labels the target, shaped as E's latent."""
        if self.config.deterministic:
            return torch.zeros_like(latent, dtype=torch.float32)
        purposes = LABEL_NOISE[: 1 + self.config.flip_teacher]
        return torch.cat([keyed_noise(batch["source"], each, latent.shape[1:], seed=self.seed) for each in purposes])

    def uniform(self, count: int, purpose: str, numbers: Tensor) -> Tensor:
        """Draw `(len(numbers), count)` values in [0, 1), on the host."""
        return rng.uniform(count, seed=self.seed, purpose=f"stage2 {purpose}", numbers=numbers)

    def _seen_images(self, batch: Mapping[str, Any], images: Images) -> Tensor:
        """Make the view that the denoiser sees: corrupted and, if the latent's reading asks for it, augmented."""
        seen = images.images
        if self.config.corruption.strength:
            seen = self._corrupted(batch, seen)
        if not self.model.config.latent.sees_strong_view:
            return seen
        numbers = batch["source"]["numbers"]
        draws = torch.cat([self.uniform(NUM_DRAWS, f"strong view {domain}", numbers) for domain in DOMAINS])
        return strong_augment(seen, draws, self.config.photometric)

    def _corrupted(self, batch: Mapping[str, Any], images: Tensor) -> Tensor:
        """Make source and mixed images more like the target's of the same number; they share the noise."""
        config, numbers = self.config.corruption, batch["source"]["numbers"]
        noise = keyed_noise(batch["source"], CORRUPTION_NOISE, images.shape[1:], seed=self.seed)
        by_domain = dict(zip(DOMAINS, images.chunk(len(DOMAINS)), strict=True))
        for name in LABELLED:
            purpose = f"stage2 corruption {name}"
            draws = draw_corruption(config, noise=noise, seed=self.seed, purpose=purpose, numbers=numbers)
            by_domain[name] = corrupt(by_domain[name], by_domain["target"], draws, config)
        return torch.cat([*by_domain.values()])

    def _target_images(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the clean target images and, if asked for, their mirrored ones after them."""
        images = to_float(batch["target"]["images"])
        return torch.cat([images, images.flip(3)]) if self.config.flip_teacher else images

    def _encoded(
        self, batch: Mapping[str, Any], images: Images, seen_images: Tensor
    ) -> tuple[EncoderOutput | None, EncoderOutput, EncoderOutput | None]:
        """Return E's output of the clean view, of the seen one, and of the target's images for pseudo-labels.

        E passes an image once. A view that nothing asks for is None.
        """
        encoder, is_clean_seen = self.model.encoder, seen_images is images.images
        needs_clean = is_clean_seen or self.model.config.latent.needs_clean_view
        clean = encoder(images.images) if needs_clean else None
        seen = clean if clean is not None and is_clean_seen else encoder(seen_images)
        if not self.need_labels:
            return clean, seen, None
        target_images = self._target_images(batch)
        if clean is None:
            return clean, seen, encoder(target_images)
        target = encoded_of(clean, ["target"])
        if self.config.flip_teacher:
            target = joined(target, encoder(target_images[len(target.latent) :]))
        return clean, seen, target

    def _targets(
        self,
        batch: Mapping[str, Any],
        pasted: Tensor,
        clean_latent: Tensor | None,
        seen: EncoderOutput,
        probabilities: Tensor | None,
    ) -> Tensors:
        """Make `z_0`, counts of the pseudo-labels' classes and, for the task loss, labels and weights.

        Labels and weights `(B, H, W)` are those of source and mixed, named `source_labels`, ... probabilities: `(B, K,
        H, W)` float32 of the target images, if labels are needed.
        """
        labels = None if probabilities is None else self._labels(batch, probabilities, pasted)
        of_z_0 = {"labels": labels.labels if labels else None, "weights": labels.weights if labels else None}
        tensors = {"z_0": self.model.diffused_latent(clean=clean_latent, seen=seen, **of_z_0)}
        if labels is not None:
            pseudo = of_domains(labels.labels, ["target"]).masked_fill(~batch["target"]["valid"], IGNORE_INDEX)
            counts = class_counts(pseudo, batch["source"]["labels"], num_classes=self.model.num_classes)
            tensors[CLASSES] = counts
        if self.config.task_weight:
            assert labels is not None
            for name in LABELLED:
                tensors[f"{name}_labels"] = of_domains(labels.labels, [name])
                tensors[f"{name}_weights"] = of_domains(labels.weights, [name])
        return tensors

    def _labels(self, batch: Mapping[str, Any], probabilities: Tensor, pasted: Tensor) -> Labels:
        return mixed_labels(batch["source"]["labels"], self._pseudo_labels(batch, probabilities), pasted)

    def _pseudo_labels(self, batch: Mapping[str, Any], probabilities: Tensor) -> PseudoLabels:
        return pseudo_labels(
            probabilities,
            threshold=self.config.confidence_threshold,
            class_thresholds=self.config.class_thresholds,
            image_weight=False,
            class_balance=self.config.class_balance,
            valid=batch["target"]["valid"],
        )
