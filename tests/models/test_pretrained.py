"""Saving a model and loading it from its folder alone."""

import json
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from iccld.models.iccld import ICCLD
from iccld.models.model_card import ModelStage
from iccld.models.settings import AttentionBackend, ConditionKind, LatentKind
from iccld.outcome import AGAIN, status_of
from tests.models.factory import BACKBONES, model_config, random_images, random_noise, tiny_model, trained_model

NAMES = ["road", "sky", "car", "pole", "person"]
PALETTE = [(i, 2 * i, 3 * i) for i in range(5)]
IMAGES = random_images(2, 3, 40, 72)


def save(model: ICCLD, folder: Path) -> Path:
    model.save_pretrained(folder, class_names=NAMES, palette=PALETTE, origin={"run": "a"})
    return folder


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_saved_model_comes_back_bit_for_bit(backbone: str, tmp_path: Path):
    model = trained_model(backbone=backbone)
    torch.manual_seed(99)
    loaded = ICCLD.from_pretrained(save(model, tmp_path))
    noise = random_noise(model, IMAGES)
    assert not loaded.training and loaded.stage is ModelStage.adversarial
    assert torch.equal(loaded.segment(IMAGES), model.segment(IMAGES))
    assert torch.equal(
        loaded.denoise_segment(IMAGES, noise=noise, num_steps=2),
        model.denoise_segment(IMAGES, noise=noise, num_steps=2),
    )
    assert loaded.card is not None and loaded.card.class_names == NAMES
    assert loaded.card.palette == [list(colour) for colour in PALETTE]
    assert loaded.card.origin == {"encoder": "", "run": "a"}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trains


def test_a_loaded_model_can_be_saved_again(tmp_path: Path):
    first = save(trained_model(latent=LatentKind.mask), tmp_path / "first")
    second = save(ICCLD.from_pretrained(first), tmp_path / "second")
    names = ["README.md", "config.json", "model.safetensors"]
    assert sorted(p.name for p in first.iterdir()) == names
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_pretrained_backbone_is_rebuilt_without_its_folder(tmp_path: Path):
    tiny_model().encoder.backbone.save_pretrained(tmp_path / "backbone")
    config = model_config()
    config.encoder.pretrained, config.encoder.backbone_config = str(tmp_path / "backbone"), {}
    model = ICCLD(config=config, num_classes=5).eval()
    save(model, tmp_path / "model")
    (tmp_path / "backbone").rename(tmp_path / "gone")
    loaded = ICCLD.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.segment(IMAGES), model.segment(IMAGES))
    assert loaded.card is not None and loaded.card.origin["encoder"] == str(tmp_path / "backbone")


def test_a_model_of_stage_1_is_saved_without_its_denoiser(tmp_path: Path):
    model = tiny_model().eval()
    save(model, tmp_path)
    assert not any(name.startswith("denoiser.") for name in load_file(tmp_path / "model.safetensors"))
    assert ICCLD.from_pretrained(tmp_path).denoiser is None
    fresh = ICCLD.from_pretrained(tmp_path, with_denoiser=True)
    assert fresh.denoiser is not None and fresh.stage is ModelStage.segmentation
    assert torch.equal(fresh.segment(IMAGES), model.segment(IMAGES))


def test_a_trained_denoiser_can_be_left_on_disk(tmp_path: Path):
    loaded = ICCLD.from_pretrained(save(trained_model(), tmp_path), with_denoiser=False)
    assert loaded.denoiser is None and loaded.stage is ModelStage.segmentation


def test_a_deterministic_model_stays_one(tmp_path: Path):
    model = trained_model()
    model.deterministic = True
    loaded = ICCLD.from_pretrained(save(model, tmp_path))
    noise = random_noise(model, IMAGES)
    got = loaded.denoise_segment(IMAGES, noise=noise, num_steps=4)
    assert torch.equal(got, model.denoise_segment(IMAGES, noise=torch.zeros_like(noise), num_steps=1))


def test_a_card_of_an_earlier_version_means_a_model_with_noise_and_the_latent_as_its_condition(tmp_path: Path):
    model = trained_model()
    card = json.loads((save(model, tmp_path) / "config.json").read_text())
    del card["deterministic"]
    for name in ("condition", "residual_steps", "residual_step"):
        del card["model"][name]
    (tmp_path / "config.json").write_text(json.dumps(card))
    loaded = ICCLD.from_pretrained(tmp_path)
    assert not loaded.deterministic and loaded.config.condition is ConditionKind.latent
    noise = random_noise(model, IMAGES)
    assert torch.equal(
        loaded.denoise_segment(IMAGES, noise=noise, num_steps=1),
        model.denoise_segment(IMAGES, noise=noise, num_steps=1),
    )


def test_loading_needs_no_training_package(tmp_path: Path):
    save(trained_model(), tmp_path)
    program = f"""
        import sys
        blocked = "accelerate deepspeed wandb hydra omegaconf xformers kornia webdataset diffusers".split()
        sys.modules.update(dict.fromkeys(blocked))  # None: as if it were not installed
        import torch
        from iccld.models.iccld import ICCLD
        ICCLD.from_pretrained({str(tmp_path)!r}).segment(torch.rand(1, 3, 32, 32))
        assert not any(sys.modules[name] for name in blocked)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)


def test_another_number_of_classes_is_refused(tmp_path: Path):
    save(trained_model(), tmp_path)
    with pytest.raises(ValueError, match=r"config\.json has 5 classes, 19 are asked for; choose the class set"):
        ICCLD.from_pretrained(tmp_path, num_classes=19)
    with pytest.raises(ValueError, match=r"4 class_names for a model of 5 classes"):
        trained_model().save_pretrained(tmp_path, class_names=NAMES[:4], palette=PALETTE)
    with pytest.raises(ValueError, match=r"5 class_names and 4 palette entries"):
        trained_model().save_pretrained(tmp_path, class_names=NAMES, palette=PALETTE[:4])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path):
    (save(trained_model(), tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing; .*save_pretrained wrote"):
        ICCLD.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "drop", "reshape", "stray"])
def test_weights_that_do_not_fit_are_named(damage: str, tmp_path: Path):
    path = save(trained_model(), tmp_path) / "model.safetensors"
    tensors = load_file(path)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        changes = {"drop": None, "reshape": torch.zeros(1)}
        tensors = {k: changes.get(damage, v) if k == "decoder.stem.weight" else v for k, v in tensors.items()}
        tensors |= {"stray": torch.zeros(1)} if damage == "stray" else {}
        save_file({k: v for k, v in tensors.items() if v is not None}, path)
    message = "cannot be read" if damage == "truncate" else "does not fit its config.json: 1 weights"
    with pytest.raises(ValueError, match=rf"model\.safetensors {message}"):
        ICCLD.from_pretrained(tmp_path)


def test_a_card_may_lack_what_only_training_asks_for(tmp_path: Path):
    """Cards of earlier versions lack it."""
    path = save(trained_model(), tmp_path) / "config.json"
    card = json.loads(path.read_text())
    for part in ("encoder", "denoiser"):
        del card["model"][part]["activation_checkpointing"]
    path.write_text(json.dumps(card))
    assert not ICCLD.from_pretrained(tmp_path).config.encoder.activation_checkpointing


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(extra=1), r"config\.json: ModelCard has unknown extra; .*Export"),
        (lambda c: c.pop("origin"), r"ModelCard has missing origin"),
        (
            lambda c: c["model"]["decoder"].update(depth=1),
            r"model card|config\.json: decoder: DecoderConfig has unknown depth",
        ),
        (lambda c: c["model"].update(latent="sound"), r"latent='sound' must be one of \['image', 'mask', 'residual'\]"),
        (lambda c: c["model"].update(latent_channels="4"), r"latent_channels='4' must be of type int"),
        (lambda c: c["model"]["decoder"].update(inter_coder=1), r"inter_coder=1 must be of type bool"),
        (lambda c: c["model"].update(decoder=3), r"decoder=3 must be a JSON object"),
        (lambda c: c["model"]["decoder"].update(width=20), r"config\.json: .*model\.decoder\.width=20 must be"),
        (lambda c: c.update(format_version=7), r"config\.json: format_version=7, this version of iccld reads 1"),
        (lambda c: c.update(stage="third"), r"stage='third' must be one of \['segmentation', 'adversarial'\]"),
    ],
)
def test_an_edited_card_is_refused(edit, message: str, tmp_path: Path):
    path = save(trained_model(), tmp_path) / "config.json"
    card = json.loads(path.read_text())
    edit(card)
    path.write_text(json.dumps(card))
    with pytest.raises(ValueError, match=message):
        ICCLD.from_pretrained(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "must hold one JSON object")])
def test_a_broken_card_is_refused(text: str, message: str, tmp_path: Path):
    (save(trained_model(), tmp_path) / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json {message}"):
        ICCLD.from_pretrained(tmp_path)


def test_a_torn_save_over_an_older_model_is_no_model_and_the_disk_s_fault(tmp_path: Path):
    save(trained_model(), tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*model\.safetensors") as caught:
            save(trained_model(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status_of(caught.value) == AGAIN
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        ICCLD.from_pretrained(tmp_path)


def test_the_attention_back_end_can_be_replaced_where_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(trained_model(), tmp_path) / "config.json"
    path.write_text(path.read_text().replace('"attention": "sdpa"', '"attention": "xformers"'))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"model\.denoiser\.attention=xformers needs a CUDA device"):
        ICCLD.from_pretrained(tmp_path)
    model = ICCLD.from_pretrained(tmp_path, attention=AttentionBackend.sdpa)
    assert model.config.denoiser.attention is AttentionBackend.sdpa
