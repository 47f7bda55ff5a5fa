"""Stage 1: its losses are those of the method, and do not change with how the batch is split."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iccld.models.iccld import ICCLD
from iccld.models.settings import LatentKind
from iccld.stages.base import StageInputs, decayed_groups
from iccld.stages.segmentation import SegmentationStage
from iccld.stages.settings import SegmentationConfig
from iccld.uda.settings import CorruptionConfig, PhotometricConfig
from tests.factory import random_batch, tiny_model_config

OPTIONS = {
    "plain": {},
    "masked": {"masked_weight": 1.0, "masked_block": 16},
    "no_teacher": {"use_teacher": False},
    "class_wise": {"class_thresholds": 0.25, "class_balance": 0.5},
    "flip": {"flip_teacher": True},
    "corruption": {"corruption": CorruptionConfig(strength=1.0)},
}


def make_stage(*, latent: LatentKind = LatentKind.image, num_classes: int = 5, **settings) -> SegmentationStage:
    torch.manual_seed(0)
    model = ICCLD(config=tiny_model_config(latent=latent), num_classes=num_classes, with_denoiser=False)
    return SegmentationStage(model, SegmentationConfig(**settings), seed=0)


def prepared(stage: SegmentationStage, numbers: range, step: int = 0) -> StageInputs:
    with torch.no_grad():
        return stage.prepare(random_batch(num_classes=stage.num_classes, numbers=numbers), step)


def with_shared_denominators(inputs: list[StageInputs]) -> list[StageInputs]:
    names = inputs[0].denominators
    shared = {name: torch.stack([i.denominators[name] for i in inputs]).mean() for name in names}
    return [StageInputs(i.tensors, shared) for i in inputs]


def total_loss(stage: SegmentationStage, inputs: StageInputs) -> Tensor:
    return torch.stack(list(stage.module(inputs).losses.values())).sum()


@pytest.mark.parametrize("latent", list(LatentKind))
@pytest.mark.parametrize("option", list(OPTIONS))
def test_the_mean_of_the_micro_batch_gradients_is_the_gradient_of_the_batch(option: str, latent: LatentKind):
    stage = make_stage(latent=latent, confidence_threshold=0.21, **OPTIONS[option])
    total_loss(stage, prepared(stage, range(4))).backward()
    whole = [p.grad.clone() for p in stage.module.parameters() if p.grad is not None]
    stage.module.zero_grad()
    for inputs in with_shared_denominators([prepared(stage, range(2)), prepared(stage, range(2, 4))]):
        (total_loss(stage, inputs) / 2).backward()
    split = [p.grad for p in stage.module.parameters() if p.grad is not None]
    assert len(whole) == len(split)
    for one, two in zip(whole, split, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_the_losses_are_the_methods():
    stage = make_stage()
    inputs = prepared(stage, range(2))
    losses = stage.module(inputs).losses
    tensors = inputs.tensors
    size = tensors["source_labels"].shape[-2:]

    def cross_entropy(images: Tensor, labels: Tensor) -> Tensor:
        encoded = stage.model.encoder(images)
        logits = F.interpolate(stage.model.decoder(encoded.latent, encoded.features), size, mode="bilinear")
        return F.cross_entropy(logits, labels.long(), ignore_index=255, reduction="none")

    source = cross_entropy(tensors["source_images"], tensors["source_labels"]).mean()
    mixed = (cross_entropy(tensors["mixed_images"], tensors["mixed_labels"]) * tensors["mixed_weights"]).mean()
    torch.testing.assert_close(losses["source"], source)
    torch.testing.assert_close(losses["mixed"], mixed)


def test_the_mix_pastes_images_labels_and_weights_with_one_mask():
    stage = make_stage(confidence_threshold=1.0)
    stage.config.photometric.jitter_probability = stage.config.photometric.blur_probability = 0.0
    batch = random_batch(num_classes=5, numbers=range(3))
    with torch.no_grad():
        tensors = stage.prepare(batch, 0).tensors
    from_source = tensors["mixed_weights"] == 1.0  # no target pixel is as sure as that
    assert 0 < from_source.float().mean() < 1
    assert torch.equal(tensors["mixed_labels"][from_source], batch["source"]["labels"][from_source])
    images = torch.where(from_source[:, None], batch["source"]["images"], batch["target"]["images"]).float() / 255
    assert torch.equal(tensors["mixed_images"], images)


def test_source_only_and_the_warm_start_never_look_at_the_target():
    for stage in (make_stage(adapt=False), make_stage(warm_start_steps=3)):
        batch = random_batch(num_classes=5, numbers=range(2))
        del batch["target"]
        assert set(stage.module(stage.prepare(batch, 2)).losses) == {"source"}
    assert "mixed" in stage.module(prepared(stage, range(2), step=3)).losses


def test_pseudo_labels_come_from_the_teacher_or_from_the_student_itself():
    for use_teacher in (True, False):
        stage = make_stage(use_teacher=use_teacher)
        for p in stage.teacher.module.parameters():
            p.zero_()
        confident = prepared(stage, range(2)).tensors["mixed_weights"]
        predictor = stage.teacher.module if use_teacher else stage.model
        with torch.no_grad():
            images = random_batch(num_classes=5, numbers=range(2))["target"]["images"].float() / 255
            expected = predictor.segment(images).argmax(1)
        labels = prepared(stage, range(2)).tensors["mixed_labels"]
        assert torch.equal(labels[confident < 1], expected.to(labels.dtype)[confident < 1])


def test_the_flip_average_turns_the_pseudo_labels_with_the_target():
    straight, turned = (random_batch(num_classes=5, numbers=range(2)) for _ in range(2))
    turned["target"]["images"] = turned["target"]["images"].flip(3)
    for flip in (True, False):
        stage = make_stage(flip_teacher=flip, masked_weight=1.0)  # masked labels are the pseudo-labels, unmixed
        with torch.no_grad():
            labels, mirrored = (stage.prepare(batch, 0).tensors["masked_labels"] for batch in (straight, turned))
        assert ((labels == mirrored.flip(2)).float().mean() > 0.999) == flip


def test_class_wise_weights_reach_the_mix_where_the_target_shows():
    stage = make_stage(class_thresholds=0.25, class_balance=0.5, masked_weight=1.0)
    tensors = prepared(stage, range(3)).tensors
    pasted = tensors["mixed_weights"] != tensors["masked_weights"]
    assert (tensors["mixed_weights"][pasted] == 1.0).all()
    weights = tensors["masked_weights"]
    assert (weights == 0).any() and weights[weights > 0].unique().numel() > 2
    torch.testing.assert_close(weights.mean(dim=(1, 2)), tensors["confident"])
    # The image weight is 0: no pixel of an untrained network is sure by the common threshold.
    stage = make_stage(class_thresholds=0.25, image_weight=True, masked_weight=1.0)
    assert (prepared(stage, range(3)).tensors["masked_weights"] == 0).all()


def test_corruption_changes_source_and_mixed_images_alone_and_not_before_adaptation():
    plain = make_stage(masked_weight=1.0)
    corrupting = make_stage(masked_weight=1.0, corruption=CorruptionConfig(strength=1.0))
    before, after = (prepared(stage, range(2)).tensors for stage in (plain, corrupting))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"source_images", "mixed_images"}
    warm = make_stage(warm_start_steps=1, corruption=CorruptionConfig(strength=1.0))
    assert torch.equal(prepared(warm, range(2)).tensors["source_images"], before["source_images"])


def test_corruption_begins_at_its_step():
    plain = make_stage()
    late = make_stage(corruption=CorruptionConfig(strength=1.0), corruption_start=2)
    for step, equal in ((1, True), (2, False)):
        before, after = (prepared(stage, range(2), step=step).tensors for stage in (plain, late))
        for name in ("source_images", "mixed_images"):
            assert torch.equal(before[name], after[name]) is equal


def test_the_mix_is_corrupted_after_it_was_pasted_and_before_the_strong_augmentation():
    still = PhotometricConfig(jitter_probability=0.0, blur_probability=0.0)
    blocks = CorruptionConfig(strength=1.0, fourier_band=0.0, jitter=0.0, blur_sigma=0.0, noise=0.0, block_ratio=1.0)
    stage = make_stage(photometric=still, corruption=blocks)
    assert (prepared(stage, range(2)).tensors["mixed_images"] == 0.5).all()  # source pixels too
    stage = make_stage(photometric=PhotometricConfig(jitter_probability=1.0, jitter=0.5), corruption=blocks)
    assert (prepared(stage, range(2)).tensors["mixed_images"] != 0.5).any()


def test_a_masked_image_has_the_mean_colour_where_it_is_hidden_and_draws_of_its_own():
    still = PhotometricConfig(jitter_probability=0.0, blur_probability=0.0)
    stage = make_stage(masked_weight=1.0, masked_ratio=1.0, photometric=still)
    hidden = prepared(stage, range(2)).tensors["masked_images"]
    assert torch.equal(hidden, torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand_as(hidden))
    strong = PhotometricConfig(jitter_probability=1.0, jitter=0.5, blur_probability=0.0)
    stage = make_stage(masked_weight=1.0, masked_ratio=0.0, photometric=strong)
    batch = random_batch(num_classes=5, numbers=range(2))
    batch["source"]["labels"].fill_(255)  # nothing is pasted, so the mix is the target
    with torch.no_grad():
        tensors = stage.prepare(batch, 0).tensors
    assert not torch.equal(tensors["mixed_images"], tensors["masked_images"])


def test_norms_positions_and_tokens_do_not_decay_whatever_their_shape():
    shapes = {"grn.weight": (1, 1, 1, 8), "cls_token": (1, 1, 8), "register_tokens": (1, 4, 8)}
    shapes |= {"layer_scale": (8, 1, 1), "logit_scale": (8, 1, 1)}
    shapes |= {
        "position_embeddings": (1, 9, 8),
        "norm.weight": (8,),
        "conv.weight": (8, 4, 1, 1),
        "head.weight": (1, 8),
    }
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    decayed, plain = decayed_groups(parameters.items(), learning_rate=1.0, weight_decay=0.1)
    assert [p.shape for p in decayed["params"]] == [shapes["conv.weight"], shapes["head.weight"]]
    assert len(plain["params"]) == 7 and plain["weight_decay"] == 0.0


def test_every_trainable_parameter_has_a_group_and_a_rate():
    stage = make_stage(encoder_learning_rate=1e-5, decoder_learning_rate=1e-4)
    groups = stage.param_groups()
    grouped = [p for group in groups for p in group["params"]]
    trainable = [p for p in stage.module.parameters() if p.requires_grad]
    assert {id(p) for p in grouped} == {id(p) for p in trainable} and len(grouped) == len(trainable)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in stage.module.named_parameters():
        if p.requires_grad:
            assert rate[id(p)] == (1e-5 if name.startswith("encoder.backbone.") else 1e-4)
            assert decay[id(p)] == (0.01 if p.dim() > 1 else 0.0)


def test_the_latents_statistics_make_it_of_zero_mean_and_unit_variance():
    stage = make_stage()
    batches = [random_batch(num_classes=5, numbers=range(4 * i, 4 * i + 4)) for i in range(2)]
    stage.finish(batches)
    for model in stage.assemble_models().values():
        images = torch.cat([batch[d]["images"].float() / 255 for batch in batches for d in ("source", "target")])
        with torch.no_grad():
            latent = (model.encoder(images).latent - model.latent_mean.view(1, -1, 1, 1)) / model.latent_std.view(
                1, -1, 1, 1
            )
        torch.testing.assert_close(latent.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
        torch.testing.assert_close(latent.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masked_ratio": 2.0}, r"masked_ratio=2.0 must be between 0 and 1"),
        ({"encoder_learning_rate": 0.0}, "must be above 0"),
        ({"class_thresholds": 1.1}, "class_thresholds=1.1 must be between 0 and 1"),
        ({"class_balance": -0.5}, "class_balance=-0.5 must be between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        SegmentationConfig(**settings)
