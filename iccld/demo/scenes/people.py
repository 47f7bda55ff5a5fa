"""Persons, two-wheelers and their riders, drawn upright at (x, z) as flat figures."""

import math

import numpy as np

from iccld.demo.scenes.canvas import BICYCLE, MOTORCYCLE, PERSON, RIDER, Canvas
from iccld.demo.scenes.vehicles import TYRE, pick
from iccld.demo.scenes.world import Colour

_SKIN: list[Colour] = [(236, 196, 166), (206, 156, 116), (122, 82, 58)]
_TOPS: list[Colour] = [(200, 60, 60), (60, 90, 170), (230, 230, 225), (50, 50, 56), (220, 150, 50), (120, 70, 130)]
_LEGS: list[Colour] = [(46, 56, 92), (40, 40, 44), (110, 96, 80), (74, 80, 90)]
_FRAMES: list[Colour] = [(40, 150, 150), (200, 50, 50), (40, 40, 44), (60, 110, 200)]
_TANKS: list[Colour] = [(180, 30, 36), (36, 60, 150), (44, 44, 50), (210, 120, 30)]


def person(canvas: Canvas, rng: np.random.Generator, *, x: float, z: float) -> None:
    """Draw a standing or walking person, 1.2 to 1.95 m tall."""
    tall = rng.uniform(1.2, 1.4) if rng.random() < 0.12 else rng.uniform(1.6, 1.95)
    top, legs, skin = pick(_TOPS, rng), pick(_LEGS, rng), pick(_SKIN, rng)
    k, stride, swing = tall / 1.75, rng.uniform(0.02, 0.3), rng.uniform(-0.25, 0.25)
    canvas.shadow((x - 0.25, x + 0.25), (z - 0.12, z + 0.15), tall)
    for foot in (-stride, stride):
        canvas.limb(x, z, (0.09 * np.sign(foot) * k, 0.88 * k, foot * k, 0.05), 0.19 * k, legs, PERSON)
    canvas.limb(x, z, (-0.24 * k, 1.4 * k, (-0.3 - swing) * k, 0.85 * k), 0.13 * k, top, PERSON)
    canvas.limb(x, z, (0.24 * k, 1.4 * k, (0.3 - swing) * k, 0.85 * k), 0.13 * k, top, PERSON)
    body = [(-0.27, 1.44), (0.27, 1.44), (0.22, 0.8), (-0.22, 0.8)]
    canvas.upright(x, z, [(dx * k, y * k) for dx, y in body], top, PERSON)
    _head(canvas, x, z, 1.6 * k, skin, pick(_LEGS, rng), PERSON)


def _head(canvas: Canvas, x: float, z: float, y: float, skin: Colour, hair: Colour, label: int) -> None:
    canvas.disc((x, y + 0.03, z), (0.14, 0.16), hair, label)
    canvas.disc((x, y - 0.03, z), (0.11, 0.12), skin, label)


def bicycle(canvas: Canvas, rng: np.random.Generator, *, x: float, z: float, turn: float) -> None:
    """Draw a bicycle; `turn` is the cosine of its heading to the image plane: 1 from the side, near 0 from behind."""
    colour, flat = pick(_FRAMES, rng), max(abs(turn), 0.16)
    canvas.shadow((x - 0.8 * flat, x + 0.8 * flat), (z - 0.1, z + 0.1), 0.5)
    for side in (-1, 1):
        hub = (x + side * 0.55 * turn, 0.36, z)
        canvas.disc(hub, (0.38 * flat, 0.38), TYRE, BICYCLE)
        canvas.disc(hub, (0.28 * flat, 0.28), (150, 150, 146), BICYCLE)
    back, crank, seat, bar = -0.55 * turn, -0.05 * turn, -0.2 * turn, 0.42 * turn
    for ends in (
        (back, 0.36, seat, 0.85), (seat, 0.85, crank, 0.36), (crank, 0.36, back, 0.36),
        (seat, 0.8, bar, 0.85), (crank, 0.36, bar, 0.85), (bar, 1.05, 0.55 * turn, 0.36),
    ):  # fmt: skip
        canvas.limb(x, z, ends, 0.1, colour, BICYCLE)
    canvas.limb(x, z, (bar - 0.18, 1.05, bar + 0.18, 1.08), 0.09, TYRE, BICYCLE)
    canvas.limb(x, z, (seat - 0.14, 0.92, seat + 0.12, 0.92), 0.1, TYRE, BICYCLE)


def motorcycle(canvas: Canvas, rng: np.random.Generator, *, x: float, z: float, turn: float) -> None:
    """Draw a motorcycle, heavier than a bicycle: thick tyres, a filled body, a lamp."""
    colour, flat = pick(_TANKS, rng), max(abs(turn), 0.32)
    canvas.shadow((x - 1.1 * flat, x + 1.1 * flat), (z - 0.15, z + 0.15), 0.8)
    for side in (-1, 1):
        hub = (x + side * 0.72 * turn, 0.36, z)
        canvas.disc(hub, (0.38 * flat, 0.38), TYRE, MOTORCYCLE)
        canvas.disc(hub, (0.17 * flat, 0.17), (140, 140, 145), MOTORCYCLE)
    flat *= math.copysign(1.0, turn)
    block = [(-0.45, 0.3), (0.4, 0.28), (0.45, 0.7), (-0.45, 0.72)]
    canvas.upright(x, z, [(dx * flat, y) for dx, y in block], (88, 90, 96), MOTORCYCLE)
    body = [(-1.0, 0.86), (-0.9, 0.68), (0.3, 0.6), (0.72, 0.82), (0.62, 1.12), (0.25, 1.08), (-0.1, 0.9)]
    canvas.upright(x, z, [(dx * flat, y) for dx, y in body], colour, MOTORCYCLE)
    canvas.limb(x, z, (0.5 * flat, 1.1, 0.76 * turn, 0.36), 0.13, (110, 112, 118), MOTORCYCLE)
    canvas.limb(x, z, (-0.75 * flat, 0.92, 0.0, 0.9), 0.13, (30, 28, 28), MOTORCYCLE)
    canvas.limb(x, z, (0.45 * flat - 0.32, 1.2, 0.45 * flat + 0.32, 1.2), 0.09, TYRE, MOTORCYCLE)
    canvas.disc((x + 0.66 * flat, 1.0, z), (0.1, 0.1), (255, 246, 200), MOTORCYCLE)


def rider(canvas: Canvas, rng: np.random.Generator, *, x: float, z: float, turn: float, motor: bool) -> None:
    """Draw a person on a bicycle or a motorcycle, with a helmet; both labels appear."""
    (motorcycle if motor else bicycle)(canvas, rng, x=x, z=z, turn=turn)
    top, legs, skin = pick(_TOPS, rng), pick(_LEGS, rng), pick(_SKIN, rng)
    helmet: Colour = pick([(240, 240, 240), (220, 40, 40), (30, 30, 34)], rng)
    seat, lean = (0.95, 0.2) if motor else (1.0, 0.32)
    hip, shoulder = -0.25 * turn, (-0.25 + lean) * turn
    hand = (0.45 * turn, seat + 0.2)
    width = 0.34 + 0.2 * (1 - abs(turn))
    for side in (-0.1, 0.1):
        knee = (hip + 0.34 * turn + side, seat - 0.22)
        canvas.limb(x, z, (hip + side, seat + 0.02, *knee), 0.2, legs, RIDER)
        canvas.limb(x, z, (*knee, 0.05 * turn + 1.3 * side, 0.34 + 1.2 * abs(side) * (side > 0)), 0.16, legs, RIDER)
    canvas.limb(x, z, (hip, seat - 0.05, shoulder, seat + 0.58), width, top, RIDER)
    for side in (-1, 1):
        reach = side * 0.22 * (1 - abs(turn))
        canvas.limb(x, z, (shoulder + reach, seat + 0.5, hand[0] + 1.2 * reach, hand[1]), 0.13, top, RIDER)
    head = shoulder + 0.1 * turn
    canvas.disc((x + head, seat + 0.76, z), (0.13, 0.16), skin, RIDER)
    canvas.disc((x + head, seat + 0.82, z), (0.17, 0.15), helmet, RIDER)
