"""Vehicles: each function draws one whose near end is at z and whose middle is at x."""

import numpy as np

from iccld.demo.scenes.canvas import BUS, CAR, TRAIN, TRUCK, Canvas
from iccld.demo.scenes.world import Colour

GLASS: Colour = (52, 66, 84)
TYRE: Colour = (26, 26, 28)
_CARS: list[Colour] = [
    (196, 40, 40), (44, 80, 170), (232, 232, 236), (40, 42, 48), (150, 154, 162), (190, 150, 60), (60, 120, 90),
]  # fmt: skip
_TRUCKS: list[Colour] = [(236, 236, 232), (214, 208, 190), (120, 150, 190), (200, 120, 60)]
_CABS: list[Colour] = [(200, 60, 40), (60, 90, 160), (230, 190, 60)]
_BUSES: list[Colour] = [(240, 186, 30), (226, 150, 40), (238, 204, 90)]
_TRAMS: list[Colour] = [(196, 30, 60), (170, 24, 48)]


def pick(colours: list[Colour], rng: np.random.Generator) -> Colour:
    """Draw one of the colours."""
    return colours[int(rng.integers(len(colours)))]


def _wheels(canvas: Canvas, x: float, half: float, z: tuple[float, ...], radius: float, label: int) -> None:
    inner, _ = canvas.inner(x - half, x + half)
    for at in z if inner is not None else ():
        canvas.wheel((inner or 0.0, radius, at), radius, TYRE, label)
    for side in (-1, 1):
        a, b = sorted((x + side * half, x + side * (half - 0.25)))
        at = z[0] - radius
        canvas.face([(a, 0, at), (b, 0, at), (b, 2 * radius, at), (a, 2 * radius, at)], TYRE, label)


def _lamps(canvas: Canvas, x: float, half: float, y: float, z: float, label: int, *, oncoming: bool) -> None:
    colour: Colour = (255, 244, 190) if oncoming else (220, 24, 24)
    for side in (-1, 1):
        a, b = sorted((x + side * half * 0.95, x + side * half * 0.62))
        canvas.face([(a, y, z), (b, y, z), (b, y + 0.2, z), (a, y + 0.2, z)], colour, label)


def _windows(canvas: Canvas, x: float, half: float, y: tuple[float, float], z: tuple[float, float, int],
             label: int) -> None:  # fmt: skip
    """Draw a row of windows along the visible side; z is (from, to, how many)."""
    inner, light = canvas.inner(x - half, x + half)
    if inner is None:
        return
    (y0, y1), step = y, (z[1] - z[0]) / z[2]
    for i in range(z[2]):
        a, b = z[0] + (i + 0.12) * step, z[0] + (i + 0.88) * step
        canvas.face([(inner, y0, a), (inner, y0, b), (inner, y1, b), (inner, y1, a)], GLASS, label, light=light)


def car(canvas: Canvas, rng: np.random.Generator, *, x: float, z: float, oncoming: bool) -> None:
    """Draw a saloon or hatchback, 4.3 m long."""
    colour, half, far = pick(_CARS, rng), 0.92, z + 4.3
    tail = 0.9 if rng.random() < 0.5 else 0.25
    canvas.shadow((x - half, x + half), (z - 0.1, far), 1.4)
    _wheels(canvas, x, half, (z + 0.8, far - 0.8), 0.34, CAR)
    canvas.box((x - half, x + half), (0.28, 0.88), (z, far), colour, CAR)
    foot, roof, y0, y1 = (z + tail, far - 1.2), (z + tail + 0.45, far - 1.9), 0.88, 1.48
    narrow = half * 0.72
    inner, light = canvas.inner(x - half, x + half)
    if inner is not None:
        top = x - narrow if inner < x else x + narrow
        canvas.face([(inner, y0, foot[0]), (inner, y0, foot[1]), (top, y1, roof[1]), (top, y1, roof[0])], colour, CAR,
                    light=light)  # fmt: skip
        a, b = foot[0] + 0.4, foot[1] - 0.5
        canvas.face([(inner, y0 + 0.06, a), (inner, y0 + 0.06, b), (top, y1 - 0.1, b - 0.5), (top, y1 - 0.1, a + 0.2)],
                    GLASS, CAR)  # fmt: skip
    rear = [(x - half * 0.96, y0, foot[0]), (x + half * 0.96, y0, foot[0]), (x + narrow, y1, roof[0]),
            (x - narrow, y1, roof[0])]  # fmt: skip
    canvas.face(rear, colour, CAR, light=canvas.light.front)
    glass = [(x - half * 0.78, y0 + 0.06, foot[0]), (x + half * 0.78, y0 + 0.06, foot[0]),
             (x + narrow * 0.86, y1 - 0.1, roof[0]), (x - narrow * 0.86, y1 - 0.1, roof[0])]  # fmt: skip
    canvas.face(glass, GLASS, CAR)
    _lamps(canvas, x, half, 0.6, z, CAR, oncoming=oncoming)
    canvas.face([(x - 0.3, 0.4, z), (x + 0.3, 0.4, z), (x + 0.3, 0.54, z), (x - 0.3, 0.54, z)], (225, 225, 215), CAR)


def truck(canvas: Canvas, rng: np.random.Generator, *, x: float, z: float, oncoming: bool) -> None:
    """Draw a lorry: a plain cargo box, a lower cab of another colour at the end that leads."""
    cargo, cab, half = pick(_TRUCKS, rng), pick(_CABS, rng), 1.2
    canvas.shadow((x - half, x + half), (z - 0.1, z + 8), 3.2)
    _wheels(canvas, x, half, (z + 1.0, z + 2.2, z + 6.8), 0.48, TRUCK)
    if oncoming:
        canvas.box((x - half, x + half), (0.9, 3.5), (z + 2.2, z + 8), cargo, TRUCK)
        canvas.box((x - half * 0.95, x + half * 0.95), (0.45, 2.7), (z, z + 2), cab, TRUCK)
        canvas.face([(x - 1, 1.6, z), (x + 1, 1.6, z), (x + 1, 2.5, z), (x - 1, 2.5, z)], GLASS, TRUCK)
        _windows(canvas, x, half * 0.95, (1.6, 2.4), (z + 0.4, z + 1.8, 1), TRUCK)
    else:
        canvas.box((x - half * 0.95, x + half * 0.95), (0.45, 2.7), (z + 6, z + 8), cab, TRUCK)
        canvas.box((x - half, x + half), (0.9, 3.5), (z, z + 5.8), cargo, TRUCK)
        canvas.box((x - half, x + half), (0.6, 0.9), (z, z + 5.8), (58, 58, 62), TRUCK)
        for at in (x - half, x - 0.03, x + half - 0.07):
            canvas.face([(at, 0.95, z), (at + 0.07, 0.95, z), (at + 0.07, 3.45, z), (at, 3.45, z)], (96, 96, 98), TRUCK)
    _lamps(canvas, x, half, 0.7, z, TRUCK, oncoming=oncoming)


def bus(canvas: Canvas, rng: np.random.Generator, *, x: float, z: float, oncoming: bool) -> None:
    """Draw a city bus: one yellow box with a band of windows, 10 m long."""
    colour, half = pick(_BUSES, rng), 1.25
    canvas.shadow((x - half, x + half), (z - 0.1, z + 10), 3.0)
    _wheels(canvas, x, half, (z + 1.8, z + 7.8), 0.48, BUS)
    canvas.box((x - half, x + half), (0.35, 3.1), (z, z + 10), colour, BUS)
    _windows(canvas, x, half, (1.45, 2.6), (z + 0.3, z + 9.7, 7), BUS)
    y0, y1 = (1.1, 2.6) if oncoming else (1.6, 2.5)
    canvas.face([(x - 1.1, y0, z), (x + 1.1, y0, z), (x + 1.1, y1, z), (x - 1.1, y1, z)], GLASS, BUS)
    canvas.face([(x - 0.7, 2.72, z), (x + 0.7, 2.72, z), (x + 0.7, 2.98, z), (x - 0.7, 2.98, z)], (30, 30, 30), BUS)
    _lamps(canvas, x, half, 0.7, z, BUS, oncoming=oncoming)


def tram(canvas: Canvas, rng: np.random.Generator, *, x: float, z: float) -> None:
    """Draw a tram, the street's train: long, red with a white belt, on the rails that the layout lays under it."""
    colour, half, far = pick(_TRAMS, rng), 1.25, z + 22
    canvas.shadow((x - half, x + half), (z - 0.1, far), 3.4)
    canvas.box((x - half, x + half), (0.12, 0.5), (z + 0.2, far), (44, 44, 48), TRAIN)
    canvas.box((x - half, x + half), (0.4, 3.4), (z, far), colour, TRAIN)
    inner, light = canvas.inner(x - half, x + half)
    if inner is not None:
        belt = [(inner, 1.3, z), (inner, 1.3, far), (inner, 2.9, far), (inner, 2.9, z)]
        canvas.face(belt, (236, 232, 224), TRAIN, light=light)
    _windows(canvas, x, half, (1.5, 2.7), (z + 0.4, far - 0.4, 12), TRAIN)
    front = [(x - half, 1.3), (x + half, 1.3), (x + half, 2.9), (x - half, 2.9)]
    canvas.upright(x, z, [(dx - x, y) for dx, y in front], (236, 232, 224), TRAIN)
    canvas.face([(x - 1, 1.5, z), (x + 1, 1.5, z), (x + 0.9, 2.8, z), (x - 0.9, 2.8, z)], GLASS, TRAIN)
    canvas.disc((x, 0.9, z), (0.16, 0.16), (255, 244, 200), TRAIN)
    canvas.limb(x, z + 4, (-0.7, 3.4, 0.0, 4.2), 0.14, (60, 60, 66), TRAIN)
    canvas.limb(x, z + 4, (0.0, 4.2, 0.7, 3.4), 0.14, (60, 60, 66), TRAIN)
