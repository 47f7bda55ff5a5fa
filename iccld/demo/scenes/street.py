"""Still things along a street: ground, frontage, trees, lamps, signs and traffic lights."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from iccld.demo.scenes.canvas import (
    BUILDING,
    FENCE,
    LIGHT,
    POLE,
    ROAD,
    SIDEWALK,
    SIGN,
    TERRAIN,
    VEGETATION,
    WALL,
    Canvas,
)
from iccld.demo.scenes.vehicles import GLASS, pick
from iccld.demo.scenes.world import Colour

FAR = 130.0
_NEAR = 1.2
_DEPTHS = [_NEAR, *np.geomspace(6.0, 900.0, 14).tolist()]  # haze is constant within a strip of ground

_FACADES: list[Colour] = [
    (190, 120, 90), (214, 190, 150), (170, 150, 140), (206, 160, 120), (150, 96, 84), (220, 206, 186), (150, 150, 160),
]  # fmt: skip
_ROOFS: list[Colour] = [(140, 70, 56), (90, 84, 88), (110, 96, 84)]
_WALLS: list[Colour] = [(176, 156, 180), (190, 168, 184), (160, 146, 176)]
_FENCES: list[Colour] = [(130, 92, 58), (150, 108, 70), (120, 84, 60)]
_LEAVES: list[Colour] = [(64, 124, 48), (84, 142, 56), (52, 104, 44), (98, 150, 60)]
_METAL: Colour = (120, 122, 126)


@dataclass(frozen=True)
class Street:
    """Cross-section: road edges and frontage lines in metres, left ones negative."""

    road: tuple[float, float]
    kerb: tuple[float, float]  # outer edges of the sidewalks
    front: tuple[float, float]
    lanes: tuple[float, ...]  # middles, 0 is the own one
    track: float | None  # middle of the lane with rails


def _strip(canvas: Canvas, x: tuple[float, float], colour: Colour, label: int) -> None:
    depths = [_NEAR, *(z for z in _DEPTHS if z > _NEAR)]
    for z0, z1 in zip(depths[-2::-1], depths[:0:-1], strict=True):
        canvas.face([(x[0], 0, z0), (x[1], 0, z0), (x[1], 0, z1), (x[0], 0, z1)], colour, label)


def _mark(canvas: Canvas, x: float, half: float, z: tuple[float, float], colour: Colour = (232, 232, 226)) -> None:
    z0, z1 = z
    canvas.face([(x - half, 0, z0), (x + half, 0, z0), (x + half, 0, z1), (x - half, 0, z1)], colour, ROAD)


def ground(canvas: Canvas, rng: np.random.Generator, street: Street, crossing: float | None) -> None:
    """Draw terrain, sidewalks with joints and kerb, the road with its markings, rails and zebra crossing."""
    _strip(canvas, (-400, 400), (122, 152, 74), TERRAIN)
    for inner, outer in zip(street.road, street.kerb, strict=True):
        _strip(canvas, (inner, outer), (186, 172, 166), SIDEWALK)
        for z in np.arange(4.0, 26.0, 2.0).tolist():
            canvas.face([(inner, 0, z), (outer, 0, z), (outer, 0, z + 0.1), (inner, 0, z + 0.1)], (158, 146, 142),
                        SIDEWALK)  # fmt: skip
        edge = sorted((inner, inner + 0.22 * np.sign(outer)))
        _strip(canvas, (edge[0], edge[1]), (206, 204, 200), SIDEWALK)
    _strip(canvas, street.road, (94, 94, 100), ROAD)
    ordered = sorted(street.lanes)
    phase = rng.uniform(0, 6)
    for a, b in pairwise(ordered):
        for z in np.arange(phase + _NEAR, 70, 6).tolist():
            _mark(canvas, (a + b) / 2, 0.08, (z, z + 3))
    for x in (street.road[0] + 0.4, street.road[1] - 0.4):
        _mark(canvas, x, 0.06, (_NEAR, FAR))
    if street.track is not None:
        for side in (-0.72, 0.72):
            _mark(canvas, street.track + side, 0.1, (_NEAR, FAR), (54, 52, 54))
    if crossing is not None:
        for x in np.arange(street.road[0] + 0.5, street.road[1] - 0.5, 1.1).tolist():
            _mark(canvas, x + 0.3, 0.3, (crossing - 1.5, crossing + 1.5))


def side_street(canvas: Canvas, street: Street, side: int, z: tuple[float, float]) -> None:
    """Draw a street that joins from one side."""
    x, end, (z0, z1) = street.road[side], 60.0 * (2 * side - 1), z
    canvas.face([(x, 0, z0), (end, 0, z0), (end, 0, z1), (x, 0, z1)], (94, 94, 100), ROAD)


def building(canvas: Canvas, rng: np.random.Generator, *, x: float, z: tuple[float, float], floors: int) -> None:
    """Draw a house whose street face stands at x, from z[0] to z[1]."""
    colour, roof, storey = pick(_FACADES, rng), pick(_ROOFS, rng), rng.uniform(2.9, 3.5)
    high, deep = floors * storey + 0.6, float(np.sign(x)) * rng.uniform(8, 14)
    a, b = sorted((x, x + deep))
    top = high + rng.uniform(1.5, 3.0)
    light = canvas.light.left if x > 0 else canvas.light.right
    ridge = [(x, high, z[0]), (x, high, z[1]), (x + deep / 2, top, z[1]), (x + deep / 2, top, z[0])]
    canvas.face(ridge, roof, BUILDING, light=light)
    canvas.box((a, b), (0, high), z, colour, BUILDING)
    canvas.face([(a, high, z[0]), (b, high, z[0]), ((a + b) / 2, top, z[0])], colour, BUILDING,
                light=canvas.light.front)  # fmt: skip
    pane: Colour = GLASS if rng.random() < 0.7 else (120, 140, 160)
    across = max(2, round(abs(deep) / 2.8))
    along = max(2, round((z[1] - z[0]) / 2.6))
    small = canvas.camera.pixels(abs(x), z[0]) * 2.6 / z[1] < 2.5
    for floor in range(floors):
        y0 = floor * storey + (0.3 if floor == 0 else 1.0)
        y1 = (floor + 1) * storey - 0.4
        for i in range(0 if small else along):
            p, q = (z[0] + (z[1] - z[0]) * (i + part) / along for part in (0.22, 0.78))
            canvas.face([(x, y0, p), (x, y0, q), (x, y1, q), (x, y1, p)], pane, BUILDING, light=light)
        for i in range(across if canvas.camera.pixels(1.4, z[0]) > 2 else 0):
            p, q = (a + (b - a) * (i + part) / across for part in (0.25, 0.75))
            canvas.face([(p, y0, z[0]), (q, y0, z[0]), (q, y1, z[0]), (p, y1, z[0])], pane, BUILDING,
                        light=canvas.light.front)  # fmt: skip


def wall(canvas: Canvas, rng: np.random.Generator, *, x: float, z: tuple[float, float]) -> None:
    """Draw a plain wall of 2.2 to 3.4 m with a coping and joints."""
    colour, high = pick(_WALLS, rng), rng.uniform(2.2, 3.4)
    a, b = sorted((x, x + 0.5 * float(np.sign(x))))
    canvas.box((a, b), (0, high), z, colour, WALL)
    light = canvas.light.left if x > 0 else canvas.light.right
    for at in np.arange(z[0] + 1.5, z[1], 3.0).tolist():
        canvas.face([(x, 0, at), (x, 0, at + 0.15), (x, high, at + 0.15), (x, high, at)], (118, 104, 122), WALL,
                    light=light)  # fmt: skip
    cap = [(x, high - 0.25, z[0]), (x, high - 0.25, z[1]), (x, high, z[1]), (x, high, z[0])]
    canvas.face(cap, (216, 204, 216), WALL, light=light)


def fence(canvas: Canvas, rng: np.random.Generator, *, x: float, z: tuple[float, float]) -> None:
    """Draw pickets on two rails; things behind show through, the label is the fence's all over."""
    colour, high = pick(_FENCES, rng), rng.uniform(1.6, 2.4)
    light = canvas.light.left if x > 0 else canvas.light.right
    panel = [(x, 0, z[0]), (x, 0, z[1]), (x, high, z[1]), (x, high, z[0])]
    canvas.face(panel, colour, FENCE, light=light * 0.8, opacity=0.45)
    for y in (0.25, high - 0.35):
        rail = [(x, y, z[0]), (x, y, z[1]), (x, y + 0.16, z[1]), (x, y + 0.16, z[0])]
        canvas.face(rail, colour, FENCE, light=light)
    step = 0.5 if z[0] < 14 else 1.0
    for at in np.arange(z[0], min(z[1], 45.0), step).tolist():
        picket = [(x, 0, at), (x, 0, at + step / 3), (x, high, at + step / 3), (x, high, at)]
        canvas.face(picket, colour, FENCE, light=light)


def tree(canvas: Canvas, rng: np.random.Generator, *, x: float, z: float, size: float = 1.0) -> None:
    """Draw a trunk and a crown of overlapping discs, lighter towards the top."""
    high, wide = size * rng.uniform(2.4, 3.2), size * rng.uniform(1.3, 2.0)
    canvas.shadow((x - wide / 2, x + wide / 2), (z - 0.5, z + 0.7), high)
    canvas.limb(x, z, (0, 0, 0, high), 0.3 * size, (96, 70, 48), VEGETATION)
    for i in range(8):
        dx, dy = rng.uniform(-0.7, 0.7) * wide, (i / 7 - 0.3) * 1.5 * wide
        radius = wide * rng.uniform(0.5, 0.75)
        canvas.disc((x + dx, high + 0.5 * wide + dy, z), (radius, 0.85 * radius), pick(_LEAVES, rng), VEGETATION,
                    light=0.82 + 0.05 * i)  # fmt: skip


def hedge(canvas: Canvas, rng: np.random.Generator, *, x: float, z: tuple[float, float]) -> None:
    """Draw bushes in a row along the street, far ones first."""
    for at in np.arange(z[1], z[0], -1.6).tolist():
        radius = rng.uniform(0.8, 1.4)
        canvas.disc((x + 0.9 * float(np.sign(x)), 0.7 * radius, at), (radius * 1.2, radius), pick(_LEAVES, rng),
                    VEGETATION, light=rng.uniform(0.8, 1.05))  # fmt: skip


def skyline(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draw the far houses and trees that close the view at the horizon."""
    for x in np.arange(-150.0, 150.0, 11.0).tolist():
        if rng.random() < 0.35:
            a = x + rng.uniform(-4, 4)
            canvas.box((a, a + 14), (0, rng.uniform(6, 15)), (FAR + 20, FAR + 30), pick(_FACADES, rng), BUILDING)
        canvas.disc((x, 2.0, FAR), (rng.uniform(6, 9), rng.uniform(3, 6.5)), pick(_LEAVES, rng), VEGETATION)


def lamp(canvas: Canvas, *, x: float, z: float) -> None:
    """Draw a street lamp whose arm reaches over the road."""
    inward = -float(np.sign(x))
    canvas.shadow((x - 0.1, x + 0.1), (z - 0.1, z + 0.1), 3.0)
    canvas.limb(x, z, (0, 0, 0, 6.2), 0.24, _METAL, POLE)
    canvas.limb(x, z, (0, 6.1, 1.6 * inward, 6.4), 0.16, _METAL, POLE)
    canvas.limb(x, z, (1.2 * inward, 6.35, 2.1 * inward, 6.45), 0.26, (225, 222, 205), POLE)


def traffic_light(canvas: Canvas, rng: np.random.Generator, *, x: float, z: float, lit: int) -> None:
    """Draw a box with three lamps, on a pole or on an arm over the road; `lit`: 0 red, 1 amber, 2 green."""
    inward, arm = -float(np.sign(x)), rng.random() < 0.4
    dx, y = (1.9 * inward, 4.0) if arm else (0.0, 2.5)
    canvas.limb(x, z, (0, 0, 0, 4.9 if arm else 2.7), 0.22, _METAL, POLE)
    if arm:
        canvas.limb(x, z, (0, 4.8, 2.0 * inward, 4.8), 0.18, _METAL, POLE)
    box = [(dx - 0.38, y), (dx + 0.38, y), (dx + 0.38, y + 1.7), (dx - 0.38, y + 1.7)]
    canvas.upright(x, z, box, (40, 44, 40), LIGHT)
    colours: Sequence[Colour] = ((255, 50, 40), (255, 190, 40), (60, 240, 110))
    for i, colour in enumerate(colours):
        seen: Colour = colour if i == lit else (76, 78, 72)
        canvas.disc((x + dx, y + 1.4 - 0.55 * i, z), (0.24, 0.24), seen, LIGHT)


def traffic_sign(canvas: Canvas, rng: np.random.Generator, *, x: float, z: float) -> None:
    """Draw a round, triangular or square sign on a thin pole."""
    kind, y = int(rng.integers(4)), rng.uniform(2.3, 2.9)
    canvas.limb(x, z, (0, 0, 0, y), 0.14, _METAL, POLE)
    if kind == 0:
        canvas.disc((x, y, z), (0.62, 0.62), (216, 30, 36), SIGN)
        canvas.disc((x, y, z), (0.4, 0.4), (246, 246, 240), SIGN)
    elif kind == 1:
        canvas.upright(x, z, [(-0.72, y - 0.5), (0.72, y - 0.5), (0, y + 0.72)], (216, 30, 36), SIGN)
        canvas.upright(x, z, [(-0.4, y - 0.33), (0.4, y - 0.33), (0, y + 0.36)], (246, 240, 200), SIGN)
    elif kind == 2:
        canvas.disc((x, y, z), (0.62, 0.62), (30, 90, 200), SIGN)
        canvas.upright(x, z, [(-0.12, y - 0.3), (0.12, y - 0.3), (0.12, y + 0.3), (-0.12, y + 0.3)], (240, 240, 240),
                       SIGN)  # fmt: skip
    else:
        canvas.upright(x, z, [(-0.68, y), (0, y - 0.68), (0.68, y), (0, y + 0.68)], (246, 204, 30), SIGN)
