"""Ways in which labels are stored, each read to `(H, W)` uint8 train ids."""

import json
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from iccld.data.images.decode import MAX_PIXELS, decode_channels, decode_image, decode_label, refuse_lossy
from iccld.labels import CITYSCAPES_NAMES, IGNORE_INDEX

_MAX_COORDINATE = 1_000_000
_MAX_NAMED = 8
_MIN_POINTS = 3
_IN_GROUPS = {*CITYSCAPES_NAMES, "caravan", "trailer", "animal", "autorickshaw", "vehicle fallback"}
"""Names of Cityscapes and IDD to which `group` is added where single objects cannot be told apart."""


class LabelsAs(Enum):
    """Ways in which a label file says which class a pixel is of."""

    ids = "ids"
    """Grey values, or the indices of a palettised image."""
    red16 = "red16"
    """The red channel of a PNG with 16 bits a channel."""
    colors = "colors"
    """RGB colours."""
    polygons = "polygons"
    """JSON: `imgWidth`, `imgHeight` and `objects`, drawn in order, each with `label`, `polygon`, perhaps `deleted`.

    labelme's form is read too: `imageWidth`, `imageHeight` and `shapes`, each with `label`, `points`, `shape_type`.
    """


class UnknownIds(ValueError):
    """Error: a label file holds ids, colours or names that its data set, or its mapping, does not define."""


def map_ids(ids: np.ndarray, train_ids: Mapping[int, int], *, spell: Callable[[int], object] = int) -> np.ndarray:
    """Map `(H, W)` integer ids to uint8 train ids. Raises UnknownIds for an id that `train_ids` does not name."""
    table = np.full(max(train_ids) + 1, -1, np.int16)
    table[list(train_ids)] = list(train_ids.values())
    if ids.min(initial=0) >= 0 and ids.max(initial=0) < len(table):
        mapped = table[ids]
        if mapped.min(initial=0) >= 0:
            return mapped.astype(np.uint8)
    raise _unknown([spell(i) for i in np.unique(ids).tolist() if i not in train_ids])


def _unknown(found: list[Any]) -> UnknownIds:
    more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
    return UnknownIds(f"the label holds ids that its data set or mapping does not define: {found[:_MAX_NAMED]}{more}")


def read_ids(data: bytes, train_ids: Mapping[int, int]) -> np.ndarray:
    """Read grey or palettised images."""
    return map_ids(decode_label(data), train_ids)


def read_red16(data: bytes, train_ids: Mapping[int, int]) -> np.ndarray:
    """Read PNGs of 16 bits a channel with the class in the red one."""
    channels = decode_channels(data)
    if channels.dtype != np.uint16 or channels.shape[-1] < 3:
        kind = f"{channels.shape[-1]} channels of {8 * channels.itemsize} bits"
        raise ValueError(f"it has {kind}; labels must be colour PNGs of 16 bits a channel")
    return map_ids(channels[..., 0], train_ids)


def read_colors(data: bytes, train_ids: Mapping[int, int]) -> np.ndarray:
    """Read images of colours; `train_ids` names colours by `color_code`."""
    refuse_lossy(data)
    return map_ids(color_codes(data), train_ids, spell=color_name)


def color_codes(data: bytes) -> np.ndarray:
    """Decode an image to the codes of its pixels' colours, `(H, W)` int32."""
    red, green, blue = np.moveaxis(decode_image(data).astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def color_code(name: str) -> int:
    """Return the colour "r g b" (0-255 each) as one number. Raises ValueError."""
    red, green, blue = (int(value) for value in name.split())
    if not {red, green, blue} <= set(range(256)):
        raise ValueError("a colour is three numbers from 0 to 255")
    return red << 16 | green << 8 | blue


def color_name(code: int) -> str:
    """Invert `color_code`."""
    return f"{code >> 16} {code >> 8 & 255} {code & 255}"


def read_polygons(data: bytes, train_ids: Mapping[str, int | None]) -> np.ndarray:
    """Draw polygons over 255. A name whose train id is None is not drawn; an unknown `cargroup` counts as `car`."""
    (width, height), objects = _parse_polygons(data)
    named = [(name if name in train_ids else _without_group(name), polygon) for name, polygon in objects]
    unknown = sorted({name for name, _ in named if name not in train_ids})
    if unknown:
        raise _unknown(unknown)
    image = Image.new("L", (width, height), IGNORE_INDEX)
    draw = ImageDraw.Draw(image)
    for name, polygon in named:
        train_id = train_ids[name]
        if train_id is not None and len(polygon) >= _MIN_POINTS:
            draw.polygon(polygon, fill=train_id)
    return np.asarray(image)


def count_not_drawn(data: bytes) -> int:
    """Count the outlines of a file of polygons that have too few points to be drawn. Raises ValueError."""
    return sum(len(polygon) < _MIN_POINTS for _, polygon in _parse_polygons(data)[1])


def _without_group(name: str) -> str:
    single = name.removesuffix("group")
    return single if single in _IN_GROUPS else name


def _parse_polygons(data: bytes) -> tuple[tuple[int, int], list[tuple[str, list[tuple[float, float]]]]]:
    """Return (width, height), and (name, points) of every object that is not deleted."""
    try:
        content = _as_objects(json.loads(data))
        width, height = int(content["imgWidth"]), int(content["imgHeight"])
        objects = [
            (str(found["label"]), [(x, y) for x, y in found["polygon"]])
            for found in content["objects"]
            if not found.get("deleted")
        ]
        inside = all(abs(value) <= _MAX_COORDINATE for _, polygon in objects for point in polygon for value in point)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no file of polygons ({type(error).__name__}: {error})") from error
    if not inside or min(width, height) < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"its size, {width}x{height}, or one of its coordinates is absurd")
    return (width, height), objects


def _as_objects(content: dict[str, Any]) -> dict[str, Any]:
    """Turn a file of labelme's into one of objects; any other file stays."""
    if "shapes" not in content:
        return content
    objects = [{"label": shape["label"], "polygon": _outline(shape)} for shape in content["shapes"]]
    return {"imgWidth": content["imageWidth"], "imgHeight": content["imageHeight"], "objects": objects}


def _outline(shape: dict[str, Any]) -> list[Any]:
    kind, points = shape.get("shape_type", "polygon"), shape["points"]
    if kind == "rectangle":
        (left, top), (right, bottom) = points
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    if kind != "polygon":
        raise ValueError(f"a shape of {kind} has no area that is read; draw polygons or rectangles")
    return points


def class_list_ids(data: bytes, train_ids: Mapping[str, int | None]) -> dict[int, int | None]:
    """Map ids to train ids by a JSON whose `labels` name the classes; the first is id 0. Raises ValueError."""
    try:
        names = [str(label["name"]) for label in json.loads(data)["labels"]]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it lists no classes ({type(error).__name__}: {error})") from error
    unknown = [name for name in names if name not in train_ids]
    if unknown or not names:
        raise ValueError(f"it names classes that the data set does not define: {unknown[:_MAX_NAMED] or 'none at all'}")
    return {i: train_ids[name] for i, name in enumerate(names)}
