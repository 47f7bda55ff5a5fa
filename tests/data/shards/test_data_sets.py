"""Each packaged data set, on a tiny tree in its distributor's own layout: as a folder, as one zip, as his zips."""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iccld.data.shards.converters import DATASETS, Converter, open_converter
from tests.data.factory import random_pair, to_ids

Files = dict[str, bytes]


def encoded(array: np.ndarray, format_name: str = "png") -> bytes:
    Image.fromarray(array).save(buffer := io.BytesIO(), format_name)
    return buffer.getvalue()


def palettised(ids: np.ndarray) -> bytes:
    (image := Image.fromarray(ids, mode="P")).putpalette([value * 7 % 256 for value in range(768)])
    image.save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def city_ids(train_ids: np.ndarray) -> bytes:
    return encoded(to_ids(train_ids))


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of `(H, W, 3)` uint16, by the format's definition; every second row is filtered by "up"."""
    height, width, _ = pixels.shape
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, -1)
    lines = [bytes([2 * (y % 2)]) + (row - rows[y - 1] * (y % 2)).tobytes() for y, row in enumerate(rows)]
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def through(table: Mapping[int, int], train_ids: np.ndarray) -> np.ndarray:
    """Train ids to the ids of a data set, by {train id: id}."""
    lookup = np.zeros(256, np.uint8)
    lookup[list(table)] = list(table.values())
    return lookup[train_ids]


SYNTHIA_IDS = {0: 3, 1: 4, 2: 2, 3: 21, 4: 5, 5: 7, 6: 15, 7: 9, 8: 6, 9: 16, 10: 1, 11: 10, 12: 17, 13: 8, 14: 18}
SYNTHIA_IDS |= {15: 19, 16: 20, 17: 12, 18: 11, 255: 22}


def synthia(train_ids: np.ndarray) -> bytes:
    instances = np.full_like(train_ids, 77, dtype=np.uint16) * 300
    return png16(np.stack([through(SYNTHIA_IDS, train_ids), instances, instances], -1))


CAMVID_COLORS = {0: (128, 0, 192), 1: (0, 0, 192), 2: (128, 0, 0), 3: (64, 192, 0), 4: (64, 64, 128)}
CAMVID_COLORS |= {5: (192, 192, 128), 6: (0, 64, 64), 7: (192, 128, 128), 8: (192, 192, 0), 10: (128, 128, 128)}
CAMVID_COLORS |= {11: (192, 128, 64), 12: (0, 128, 192), 13: (64, 128, 192), 16: (192, 64, 128), 17: (192, 0, 192)}
CAMVID_LACKS = (9, 14, 15, 18)


def camvid(train_ids: np.ndarray) -> bytes:
    colors = np.zeros((256, 3), np.uint8)
    colors[255] = (64, 0, 64)
    colors[list(CAMVID_COLORS)] = list(CAMVID_COLORS.values())
    return encoded(colors[train_ids])


def mapillary_config(version: str) -> bytes:
    """The class list of the package: the names of our table in its order, as the package's file has them."""
    converter = open_converter(f"mapillary_{version}", Path(__file__).parent, split="training")
    return json.dumps({"labels": [{"name": name, "evaluate": True} for name in converter.ids]}).encode()


def mapillary(version: str) -> Callable[[np.ndarray], bytes]:
    names = list(open_converter(f"mapillary_{version}", Path(__file__).parent, split="training").ids.values())
    ids = {train_id: names.index(train_id) for train_id in (*range(19), 255)}
    return lambda train_ids: palettised(through(ids, train_ids))


@dataclass(frozen=True)
class Layout:
    """Paths of a set's first and second image and label, and the storage of a label."""

    dataset: str
    split: str
    images: tuple[str, str]
    labels: tuple[str, str]
    keys: tuple[str, str]
    store: Callable[[np.ndarray], bytes]
    lacks: tuple[int, ...] = ()
    others: tuple[tuple[str, bytes], ...] = ()
    """Files beside them: such as must not be taken for images, and what the labels need."""


def layout(dataset: str, split: str, keys: tuple[str, str], image: str, label: str, store, **more) -> Layout:
    """Make a layout of paths with {0} for the key and {1} for the key's part before its first `_`."""
    images, labels = (tuple(path.format(key, key.split("_")[0]) for key in keys) for path in (image, label))
    return Layout(dataset, split, images, labels, keys, store, **more)


V12, V20 = mapillary_config("v1.2"), mapillary_config("v2.0")
LAYOUTS = [
    layout("gta5", "", ("00001", "24966"), "images/{0}.png", "labels/{0}.png", lambda t: palettised(to_ids(t))),
    layout(
        "synthia", "", ("0000000", "0009399"), "RGB/{0}.png", "GT/LABELS/{0}.png", synthia,
        others=(("GT/COLOR/0000000.png", b""), ("Depth/Depth/0000000.png", b"")),
    ),
    layout(
        "cityscapes", "val", ("frankfurt_000000_000294_x", "munster_000173_000019_x"),
        "leftImg8bit/val/{1}/{0}_leftImg8bit.png", "gtFine/val/{1}/{0}_gtFine_labelIds.png", city_ids,
        others=(
            ("gtFine/val/munster/munster_000173_000019_x_gtFine_instanceIds.png", b""),
            ("leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png", b""),
        ),
    ),
    layout(
        "acdc", "train", ("GOPR0475_frame_000041", "GP010376_frame_000054"),
        "rgb_anon/fog/train/{1}/{0}_rgb_anon.png", "gt/fog/train/{1}/{0}_gt_labelTrainIds.png", encoded,
        others=(
            ("rgb_anon/fog/train_ref/GOPR0475/GOPR0475_frame_000041_rgb_ref_anon.png", b""),
            ("gt/fog/train/GOPR0475/GOPR0475_frame_000041_gt_labelIds.png", b""),
            ("rgb_anon/night/val/GOPR0356/GOPR0356_frame_000324_rgb_anon.png", b""),
        ),
    ),
    layout(
        "dark_zurich", "val/night", ("GOPR0356_frame_000321", "GOPR0356_frame_000324"),
        "rgb_anon/val/night/{1}/{0}_rgb_anon.png", "gt/val/night/{1}/{0}_gt_labelTrainIds.png", encoded,
        others=(("rgb_anon/val_ref/day/GOPR0356_ref/GOPR0356_frame_000321_ref_rgb_anon.png", b""),),
    ),
    layout(
        "bdd100k", "train", ("0004a4c0-d4dff0ad", "00054602-3bf57337"),
        "images/10k/train/{0}.jpg", "labels/sem_seg/masks/train/{0}.png", encoded,
        others=(("labels/sem_seg/colormaps/train/0004a4c0-d4dff0ad.png", b""), ("images/100k/train/x.jpg", b"")),
    ),
    layout(
        "mapillary_v1.2", "training", ("-zr8rKKZ", "yM0PZQ_e"), "training/images/{0}.jpg", "training/labels/{0}.png",
        mapillary("v1.2"), others=(("config.json", V12), ("training/instances/-zr8rKKZ.png", b"")),
    ),
    layout(
        "mapillary_v1.2", "validation", ("-zr8rKKZ", "yM0PZQ_e"),
        "validation/images/{0}.jpg", "validation/v1.2/labels/{0}.png", mapillary("v1.2"),
        others=(("config_v1.2.json", V12), ("config_v2.0.json", V20), ("validation/v2.0/labels/yM0PZQ_e.png", b"")),
    ),
    layout(
        "mapillary_v2.0", "validation", ("-zr8rKKZ", "yM0PZQ_e"),
        "validation/images/{0}.jpg", "validation/v2.0/labels/{0}.png", mapillary("v2.0"),
        others=(("config_v1.2.json", V12), ("config_v2.0.json", V20), ("validation/v1.2/labels/yM0PZQ_e.png", b"")),
    ),
    layout(
        "kitti", "training", ("000000_10", "000199_10"),
        "training/image_2/{0}.png", "training/semantic/{0}.png", city_ids,
        others=(("training/semantic_rgb/000000_10.png", b""), ("testing/image_2/000001_10.png", b"")),
    ),
    layout(
        "camvid", "", ("0001TP_006690", "Seq05VD_f05100"),
        "701_StillsRaw_full/{0}.png", "LabeledApproved_full/{0}_L.png", camvid, lacks=CAMVID_LACKS,
    ),
    layout("folder", "val", ("00001", "a/00002"), "val/images/{0}.webp", "val/labels/{0}.png", encoded),
]  # fmt: skip


def expected(layout: Layout, number: int) -> np.ndarray:
    train_ids = random_pair(number)[1]
    return np.where(np.isin(train_ids, layout.lacks), 255, train_ids)


def files(layout: Layout, *, labels: bool = True) -> Files:
    found: Files = {}
    for i, (image, label) in enumerate(zip(layout.images, layout.labels, strict=True)):
        found[image] = encoded(random_pair(i)[0], "jpeg" if image.endswith("jpg") else Path(image).suffix[1:])
        if labels:
            found[label] = layout.store(expected(layout, i))
    return found | {path: data for path, data in layout.others if labels or not path.startswith(("gt", "labels"))}


def write_folder(root: Path, found: Files) -> Path:
    for path, data in found.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def write_zip(path: Path, found: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in found.items():
            archive.writestr(name, data)
    return path


def write_zips(root: Path, found: Files) -> Path:
    """One zip for each folder at the top, each with the folder `set/` around it; CamVid's labels have none at all."""
    for top in {path.split("/")[0] for path in found}:
        part = {path: data for path, data in found.items() if path.split("/")[0] == top}
        bare = top == "LabeledApproved_full"
        write_zip(root / f"{top}.zip", {p.removeprefix(f"{top}/") if bare else f"set/{p}": d for p, d in part.items()})
    write_zip(root / "readme.zip", {"readme.txt": b"", "__MACOSX/images/._x.png": b""})
    return root


INPUTS = {
    "folder": write_folder,
    "folder one deeper": lambda root, found: write_folder(root / "Some_Set", found).parent,
    "zip": lambda root, found: write_zip(root / "set.zip", found),
    "zip one deeper": lambda root, found: write_zip(root / "a.zip", {f"Some_Set/{p}": d for p, d in found.items()}),
    "folder of zips": write_zips,
}


def assert_holds(converter: Converter, layout: Layout) -> None:
    pairs = converter.pairs()
    assert [(pair.key, pair.image, pair.label) for pair in pairs] == [
        *zip(layout.keys, layout.images, layout.labels, strict=True)
    ]
    for i, pair in enumerate(pairs):
        assert converter.tree.read(pair.image) == files(layout)[pair.image]
        train_ids = converter.train_ids(pair.label or "")
        assert train_ids.dtype == np.uint8
        np.testing.assert_array_equal(train_ids, expected(layout, i))


@pytest.mark.parametrize("write", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.dataset} {layout.split}")
def test_a_set_is_read_to_the_pixel_from_every_kind_of_input(tmp_path: Path, layout: Layout, write) -> None:
    root = write(tmp_path / "input", files(layout))
    assert_holds(open_converter(layout.dataset, root, split=layout.split), layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.dataset} {layout.split}")
def test_a_target_set_needs_no_labels(tmp_path: Path, layout: Layout) -> None:
    root = write_folder(tmp_path, files(layout, labels=False))
    converter = open_converter(layout.dataset, root, split=layout.split)
    pairs = converter.pairs()
    assert [pair.image for pair in pairs] == list(layout.images)
    assert [pair.label for pair in pairs] == list(layout.labels)
    assert not any(converter.tree.exists(label) for label in layout.labels)


def test_every_packaged_set_has_a_test() -> None:
    assert set(DATASETS) == {layout.dataset for layout in LAYOUTS} | {"idd"}
