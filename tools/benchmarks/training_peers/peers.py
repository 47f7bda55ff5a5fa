"""Peers with which bench_train.py compares a step: the usual ways to train the same modules.

Both peers take the stage's modules, its parameter groups and its objective, and keep the order of work of the code that
they stand for. They draw from torch's global generator on the device.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from iccld.diffusion import add_noise
from iccld.labels import IGNORE_INDEX
from iccld.losses import domain_confusion, domain_cross_entropy, latent_mse, weighted_cross_entropy
from iccld.runtime.batches import map_tensors
from iccld.stages.adversarial import AdversarialStage
from iccld.stages.segmentation import SegmentationStage
from iccld.stages.settings import DOMAINS
from iccld.strides import LATENT_STRIDE
from iccld.uda.classmix import class_mask, paste
from iccld.uda.photometric import NUM_DRAWS, strong_augment
from iccld.uda.pseudo_labels import class_probabilities, pseudo_labels


def new_accelerator() -> Accelerator:
    """Make an accelerator with the precision of the engine made before it in this process."""
    return Accelerator(cpu=not torch.cuda.is_available())


class AdversarialDraws(NamedTuple):
    """Classes to paste `(B, K)`, augmentation `(3B, 7)`, timesteps `(3B,)`, noise `(3B, C, h, w)`."""

    scores: Tensor
    photometric: Tensor
    t: Tensor
    noise: Tensor


class TwoOptimisers:
    """Stage 2 as a plain Accelerate loop: a denoiser's step through the discriminator, then the discriminator's step on
    the detached predictions; an AdamW and a backward pass each, and a loop over the parameters for the average.

    The three domains pass together. E encodes what is asked of it each time: the target for its pseudo-labels, where
    the reading of the latent needs them, the clean images, and the augmented ones.
    """

    def __init__(self, stage: AdversarialStage, batch: dict[str, Any]) -> None:
        self.model, self.config, self.step = stage.model, stage.config, 0
        self.average = stage.teacher.module
        self.accelerator = new_accelerator()
        self.batch = map_tensors(batch, lambda tensor: tensor.to(self.accelerator.device))
        *denoising, discriminating = stage.param_groups()
        self.denoiser, self.denoiser_optimizer = self.accelerator.prepare(
            stage.module.denoiser, torch.optim.AdamW(denoising)
        )
        self.discriminator, self.discriminator_optimizer = self.accelerator.prepare(
            stage.module.discriminator, torch.optim.AdamW([discriminating])
        )

    def draw(self) -> AdversarialDraws:
        images = self.batch["source"]["images"]
        count, device = len(DOMAINS) * len(images), images.device
        sides = [side // LATENT_STRIDE for side in images.shape[-2:]]
        return AdversarialDraws(
            torch.rand(len(images), self.model.num_classes, device=device),
            torch.rand(count, NUM_DRAWS, device=device),
            torch.randint(0, len(self.model.alpha_bar), (count,), device=device),
            torch.randn(count, self.model.config.latent_channels, *sides, device=device),
        )

    def __call__(self, draws: AdversarialDraws | None = None) -> None:
        draws = draws or self.draw()
        z_t, condition, domains = self._prepare(draws)
        config, weights = self.config, torch.tensor(self.config.domain_weights, device=z_t.device)[domains]
        predicted = self.denoiser(z_t, draws.t, condition).noise_pred
        ramp = min(1.0, (self.step + 1) / max(1, config.adversarial_ramp_steps))
        adversarial = domain_confusion(self.discriminator(predicted, draws.t)).mean()
        diffusion = (weights * latent_mse(predicted, draws.noise)).sum() / weights.sum()
        self.accelerator.backward(diffusion + ramp * config.adversarial_weight * adversarial)
        self.denoiser_optimizer.step()
        self.denoiser_optimizer.zero_grad()
        self.discriminator_optimizer.zero_grad()  # of what the denoiser's step left there
        logits = self.discriminator(predicted.detach(), draws.t)
        self.accelerator.backward(domain_cross_entropy(logits, domains).mean())
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()
        self._average()
        self.step += 1

    @torch.no_grad()
    def _prepare(self, draws: AdversarialDraws) -> tuple[Tensor, Any, Tensor]:
        source, target = (self.batch[name]["images"].float() / 255 for name in ("source", "target"))
        labels = self.batch["source"]["labels"]
        mask = class_mask(labels, draws.scores)
        with self.accelerator.autocast():
            if self.model.mask_encoder is not None:
                guessed = self.model.segment(target).argmax(dim=1).to(labels.dtype)
                labels = torch.cat([labels, guessed, paste(mask, labels, guessed)])
            clean = torch.cat([source, target, paste(mask, source, target)])
            encoded = seen = self.model.encoder(clean)
            if self.model.mask_encoder is None:
                seen = self.model.encoder(strong_augment(clean, draws.photometric, self.config.photometric))
            z_0 = self.model.diffused_latent(clean=encoded.latent, seen=seen, labels=labels, weights=None)
            condition = self.model.condition_of(seen, clean)
        domains = torch.arange(len(DOMAINS), device=clean.device).repeat_interleave(len(source))
        return add_noise(z_0, draws.noise, draws.t, self.model.alpha_bar), condition, domains

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(1 - 1 / (self.step + 1), self.config.teacher_decay)
        for average, p in zip(self.average.parameters(), self.denoiser.parameters(), strict=True):
            average.mul_(decay).add_(p, alpha=1 - decay)


class Segmenter(nn.Module):
    """D(E(x)): what DAFormer's loop calls a model."""

    def __init__(self, stage: SegmentationStage) -> None:
        super().__init__()
        self.encoder, self.decoder = stage.module.encoder, stage.module.decoder

    def forward(self, images: Tensor) -> Tensor:
        encoded = self.encoder(images)
        return self.decoder(encoded.latent, encoded.features)


class MixingDraws(NamedTuple):
    """Classes to paste `(B, K)`, augmentation `(B, 7)`."""

    scores: Tensor
    photometric: Tensor


class DAFormerOrder:
    """Stage 1 in the order of DAFormer's `forward_train`: the average moves, parameter by parameter; the source passes
    forward and backward; the teacher, in train mode, labels the target; the mixed images pass forward and
    backward; AdamW steps. Each loss is read for the log where it arises.

    Its average lags a step behind ours, so only the first step gives equal weights. Images are augmented in batch, as
    ours are, where DAFormer goes image by image.
    """

    def __init__(self, stage: SegmentationStage, batch: dict[str, Any], *, is_fp32: bool = False) -> None:
        """`is_fp32`: DAFormer's own precision, whatever ours is; else student and teacher have the engine's."""
        self.config, self.step = stage.config, 0
        self.student, self.teacher = stage.model, stage.teacher.module.train()
        self.accelerator = new_accelerator()
        self.batch = map_tensors(batch, lambda tensor: tensor.to(self.accelerator.device))
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(stage.param_groups()))
        self.segmenter = Segmenter(stage) if is_fp32 else self.accelerator.prepare(Segmenter(stage))
        self.autocast = nullcontext if is_fp32 else self.accelerator.autocast

    def draw(self) -> MixingDraws:
        images = self.batch["target"]["images"]
        count, device = len(images), images.device
        scores = torch.rand(count, self.student.num_classes, device=device)
        return MixingDraws(scores, torch.rand(count, NUM_DRAWS, device=device))

    def __call__(self, draws: MixingDraws | None = None) -> None:
        draws = draws or self.draw()
        self.optimizer.zero_grad()
        if self.step > 0:
            self._average()
        source, target = (self.batch[name]["images"].float() / 255 for name in ("source", "target"))
        labels = self.batch["source"]["labels"]
        self._learn(source, labels, None)
        with torch.no_grad(), self.autocast():
            pseudo = pseudo_labels(
                class_probabilities(self.teacher.segment, target, flip=self.config.flip_teacher),
                threshold=self.config.confidence_threshold,
                class_thresholds=self.config.class_thresholds,
                image_weight=self.config.image_weight,
                class_balance=self.config.class_balance,
                valid=self.batch["target"]["valid"],
            )
            mask = class_mask(labels, draws.scores)
            mixed = strong_augment(paste(mask, source, target), draws.photometric, self.config.photometric)
            weights = paste(mask, torch.ones_like(pseudo.weights), pseudo.weights)
            mixed_labels = paste(mask, labels, pseudo.labels)
        self._learn(mixed, mixed_labels, weights)
        self.optimizer.step()
        self.step += 1

    def _learn(self, images: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        valid = (labels != IGNORE_INDEX).sum()
        loss = weighted_cross_entropy(self.segmenter(images), labels, weights=weights, denominator=valid)
        self.accelerator.backward(loss)
        loss.item()

    def _average(self) -> None:
        decay = min(1 - 1 / (self.step + 1), self.config.teacher_decay)
        for average, p in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if not p.data.shape:
                average.data = decay * average.data + (1 - decay) * p.data
            else:
                average.data[:] = decay * average[:].data[:] + (1 - decay) * p[:].data[:]
