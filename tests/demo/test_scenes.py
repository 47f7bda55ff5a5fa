"""The embedded data set: deterministic, whole (all classes, both domains), exact labels, the real sets' layouts."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

from iccld.demo import draw
from iccld.demo.scenes import Domain, render, write_cityscapes, write_gta5
from iccld.demo.scenes.canvas import BUS, CAR, FENCE, Camera, Canvas, Light
from iccld.demo.scenes.layout import CYCLE, LANE, PARKING, street_layout
from iccld.demo.scenes.world import WORLDS
from iccld.labels import CITYSCAPES_ID_TO_TRAIN_ID, CITYSCAPES_IDS, CITYSCAPES_PALETTE, lookup_table
from iccld.rng import numpy_generator

SIZE = {"height": 64, "width": 128}
DOMAINS = list(Domain)


@pytest.fixture(scope="module")
def shares() -> dict[Domain, np.ndarray]:
    """Class shares of 100 images at the demo's size: (100, 19) float64, by domain."""
    drawn = {}
    for domain in DOMAINS:
        labels = [render(seed=3, domain=domain, number=n, height=128, width=256)[1] for n in range(100)]
        drawn[domain] = np.stack([np.bincount(y.ravel(), minlength=256)[:19] / y.size for y in labels])
    return drawn


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_image_is_a_function_of_its_key(domain: Domain) -> None:
    image, labels = render(seed=1, domain=domain, number=7, **SIZE)
    render(seed=1, domain=domain, number=8, **SIZE)
    again, labels_again = render(seed=1, domain=domain, number=7, **SIZE)
    assert np.array_equal(image, again) and np.array_equal(labels, labels_again)
    for other in ({"seed": 1, "number": 8}, {"seed": 2, "number": 7}):
        assert not np.array_equal(labels, render(domain=domain, **other, **SIZE)[1])


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (100, 150), (256, 512)])
def test_shapes_types_and_ranges(domain: Domain, height: int, width: int) -> None:
    image, labels = render(seed=1, domain=domain, number=0, height=height, width=width)
    assert image.shape == (height, width, 3) and image.dtype == np.uint8
    assert labels.shape == (height, width) and labels.dtype == np.uint8
    assert labels.max() < 19
    assert image.std() > 20 and image.flags.writeable and labels.flags.writeable


def test_resolution_changes_the_sampling_and_not_the_scene() -> None:
    small = render(seed=1, domain=Domain.GAME, number=5, height=128, width=256)[1]
    large = render(seed=1, domain=Domain.GAME, number=5, height=256, width=512)[1]
    assert (large[::2, ::2] == small).mean() > 0.93


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_class_is_seen_in_at_least_one_image_of_twenty(shares: dict[Domain, np.ndarray], domain: Domain) -> None:
    seen = (shares[domain] > 0.001).mean(axis=0)  # 33 pixels of 256x128
    assert (seen >= 0.05).all(), seen


def test_the_domains_have_different_class_statistics(shares: dict[Domain, np.ndarray]) -> None:
    game, camera = (shares[domain].mean(axis=0) for domain in DOMAINS)
    assert np.abs(game - camera).sum() > 0.1
    assert camera[13] > 1.2 * game[13]  # cars
    assert game[9] > 2 * camera[9]  # terrain


def test_the_domains_look_different_where_the_class_is_the_same() -> None:
    means = {}
    for domain in DOMAINS:
        drawn = [render(seed=1, domain=domain, number=n, **SIZE) for n in range(10)]
        pixels = {c: np.concatenate([image[labels == c] for image, labels in drawn]) for c in (0, 2, 8, 10)}
        means[domain] = {c: p.mean(axis=0) for c, p in pixels.items()}
    for c in (0, 2, 8, 10):
        assert np.abs(means[Domain.GAME][c] - means[Domain.CAMERA][c]).max() > 10, c


def test_a_photograph_is_rough_where_a_drawing_is_flat() -> None:
    """Neighbouring pixels of one class are mostly equal in a drawing and hardly ever in a photograph."""
    for domain, flat in ((Domain.GAME, True), (Domain.CAMERA, False)):
        image, labels = render(seed=1, domain=domain, number=3, height=128, width=256)
        same = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] != 10)
        equal = (image[:, 1:] == image[:, :-1]).all(axis=2)[same].mean()
        assert equal > 0.8 if flat else equal < 0.05


def test_picture_and_labels_share_every_edge() -> None:
    """Slow reference: paint each polygon in a colour that names its label; the picture must spell the labels."""
    light = Light(saturation=1, exposure=1, left=1, right=1, front=1, visibility=float("inf"), haze=(0, 0, 0),
                  shadow=0, shadow_shift=0.5)  # fmt: skip
    camera = Camera(width=96, height=64, focal=70, centre=45.5, horizon=27.3, mount=1.5)
    canvas = Canvas(Image.new("RGB", (96, 64), (10, 10, 10)), camera, light)
    rng = np.random.default_rng(0)
    for _ in range(300):
        label, z = int(rng.integers(19)), float(rng.uniform(2, 30))
        points = [(*rng.uniform(-4, 4, 2).tolist(), z + float(rng.uniform(0, 5))) for _ in range(rng.integers(3, 9))]
        canvas.face(points, (label, label, label), label)
        canvas.shadow((-2, 2), (z, z + 1), 1.0)
    assert np.array_equal(np.array(canvas.picture), np.repeat(np.array(canvas.labels)[..., None], 3, axis=2))


def test_a_shadow_darkens_the_picture_and_leaves_the_labels() -> None:
    light = Light(saturation=1, exposure=1, left=1, right=1, front=1, visibility=50, haze=(0, 0, 0), shadow=0.5,
                  shadow_shift=0.5)  # fmt: skip
    camera = Camera(width=64, height=64, focal=50, centre=32, horizon=20, mount=1.5)
    canvas = Canvas(Image.new("RGB", (64, 64), (200, 200, 200)), camera, light)
    before = np.array(canvas.labels)
    canvas.shadow((-1, 1), (3, 6), 1.0)
    assert np.array_equal(before, np.array(canvas.labels))
    assert np.array(canvas.picture).min() < 150


@pytest.mark.parametrize("domain", DOMAINS)
def test_vehicles_of_a_band_do_not_touch(domain: Domain) -> None:
    lengths = {"car": 4.3, "truck": 8.0, "bus": 10.0, "tram": 22.0}
    for number in range(60):
        layout = street_layout(WORLDS[domain], numpy_generator(5, "test", number))
        spans: dict[float, list[tuple[float, float]]] = {}
        for thing in layout.placed:
            call = thing.draw
            assert isinstance(call, partial) and thing.z > 0
            if call.func.__name__ in lengths:
                middle = min(layout.bands, key=lambda x, call=call: abs(x - call.keywords["x"]))
                spans.setdefault(middle, []).append((thing.z, thing.z + lengths[call.func.__name__]))
        for band in spans.values():
            assert all(near[1] < far[0] for near, far in pairwise(sorted(band)))


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_cross_section_is_ordered_and_its_bands_are_apart(domain: Domain) -> None:
    for number in range(60):
        layout = street_layout(WORLDS[domain], numpy_generator(5, "test", number))
        bands, street = sorted(layout.bands), layout.street
        width = {**dict.fromkeys(street.lanes, LANE), **dict.fromkeys(layout.cycle, CYCLE)}
        for a, b in pairwise(bands):
            assert b - a == pytest.approx((width.get(a, PARKING) + width.get(b, PARKING)) / 2)
        edges = [street.front[0], street.kerb[0], street.road[0], *bands, street.road[1], street.kerb[1]]
        assert edges == sorted(edges) and street.kerb[1] < street.front[1]


@pytest.mark.parametrize("order", ["near_first", "far_first"])
def test_what_is_nearer_covers_what_is_farther(order: str) -> None:
    """A wall of label BUS at 10 m in the own lane hides one of label CAR at 20 m, however they were added."""
    light = Light(saturation=1, exposure=1, left=1, right=1, front=1, visibility=50, haze=(0, 0, 0), shadow=0.5,
                  shadow_shift=0.5)  # fmt: skip
    canvas = Canvas(Image.new("RGB", (64, 64)), Camera(64, 64, 50, 32, 28, 1.5), light)
    layout = street_layout(WORLDS[Domain.GAME], numpy_generator(5, "test", 0))
    layout.placed.clear()

    def panel(canvas: Canvas, *, z: float, half: float, label: int) -> None:
        canvas.upright(0.0, z, [(-half, 0), (half, 0), (half, 3), (-half, 3)], (9, 9, 9), label)

    things = [(0.0, 10.0, 1.0, BUS), (0.0, 20.0, 1.0, CAR), (5.0, 8.0, 1.0, FENCE)]
    for band, z, half, label in things if order == "near_first" else things[::-1]:
        layout.add(band, z, partial(panel, z=z, half=half, label=label))
    layout.draw(canvas, np.random.default_rng(0))
    seen = set(np.unique(np.array(canvas.labels)[20:33, 30:34]))
    assert seen == {BUS}  # the inner band hides the outer one too, though that is nearer along the street


@pytest.mark.parametrize("name", ["height", "width"])
def test_an_image_that_is_too_small_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"scenes.{name}=16 must be at least 32; the demo draws 128x256"):
        render(seed=1, domain=Domain.GAME, number=0, **{**SIZE, name: 16})


def _train_ids(path: Path) -> np.ndarray:
    return lookup_table(CITYSCAPES_ID_TO_TRAIN_ID)[np.array(Image.open(path))]


def test_gta5_layout(tmp_path: Path) -> None:
    write_gta5(tmp_path, count=3, seed=4, **SIZE)
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["00001.png", "00002.png", "00003.png"]
    assert sorted(p.name for p in (tmp_path / "labels").iterdir()) == ["00001.png", "00002.png", "00003.png"]
    image, labels = render(seed=4, domain=Domain.GAME, number=2, **SIZE)
    stored = Image.open(tmp_path / "labels" / "00002.png")
    assert stored.mode == "P"
    assert np.array_equal(_train_ids(tmp_path / "labels" / "00002.png"), labels)
    assert np.array_equal(np.array(stored.convert("RGB")), np.array(CITYSCAPES_PALETTE, np.uint8)[labels])
    assert np.array_equal(np.array(Image.open(tmp_path / "images" / "00002.png")), image)


def test_cityscapes_layout(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, train=3, val=2, seed=4, **SIZE)
    images = sorted((tmp_path / "leftImg8bit").glob("*/*/*_leftImg8bit.png"))
    assert [len([p for p in images if split in p.parts]) for split in ("train", "val")] == [3, 2]
    assert (tmp_path / "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png") in images
    for path in images:
        split, city = path.parts[-3:-1]
        stem = path.name.removesuffix("_leftImg8bit.png")
        labels = Image.open(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png")
        assert labels.mode == "L" and labels.size == Image.open(path).size == (128, 64)
        assert set(np.unique(np.array(labels))) <= {0, *CITYSCAPES_IDS}
    first = _train_ids(tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png")
    assert np.array_equal(first, render(seed=4, domain=Domain.CAMERA, number=0, **SIZE)[1])


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_second_start_keeps_what_is_there_and_adds_what_is_missing(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, train=3, val=1, seed=4, **SIZE)
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    lost = next(p for p in kept if "train" in p.parts and p.name.endswith("_leftImg8bit.png"))
    before = _contents(tmp_path)
    lost.unlink()
    write_cityscapes(tmp_path, train=5, val=1, seed=4, **SIZE)
    after = _contents(tmp_path)
    assert before.items() <= after.items() and len(after) == len(before) + 4
    images = [data for name, data in after.items() if name.endswith("_leftImg8bit.png")]
    assert len(set(images)) == 6  # no validation image is a training image
    partner = "_".join(lost.name.split("_")[:3])
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items() if not p.name.startswith(partner))


def test_several_processes_write_the_same_bytes(tmp_path: Path) -> None:
    for workers in (1, 2):
        write_gta5(tmp_path / str(workers), count=4, seed=4, workers=workers, **SIZE)
    assert _contents(tmp_path / "1") == _contents(tmp_path / "2")


def test_no_half_written_file_has_its_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Image.Image, file: BinaryIO, **_: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="disk full"):
        write_gta5(tmp_path, count=1, seed=4, **SIZE)
    assert not list(tmp_path.rglob("*.png"))
    monkeypatch.undo()
    write_gta5(tmp_path, count=1, seed=4, **SIZE)
    assert Image.open(tmp_path / "images" / "00001.png").size == (128, 64)


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    write_gta5(tmp_path, count=1, seed=4, **SIZE)
    assert json.loads((tmp_path / "scenes.json").read_text())["seed"] == 4
    with pytest.raises(ValueError, match=r"scenes\.folder=.*'seed': 4.*asked for.*'seed': 5.*remove the folder"):
        write_gta5(tmp_path, count=1, seed=5, **SIZE)


def test_no_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--workers 0 must be at least 1"):
        write_gta5(tmp_path, count=1, seed=4, workers=0, **SIZE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "abc"], "--size: abc must be HEIGHTxWIDTH, as in 256x512"),
        (["--size", "16x64"], "draw: scenes.height=16 must be at least 32"),
        (["--workers", "0"], "draw: --workers 0 must be at least 1"),
        (["--output", "/dev/null/x"], "draw: [Errno 20] Not a directory"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--source", "1", "--target", "1", "--validation", "1", "--workers", "1"]
    with pytest.raises(SystemExit) as ending:
        draw.main(["--output", str(tmp_path / "a"), *few, *words])
    assert ending.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
