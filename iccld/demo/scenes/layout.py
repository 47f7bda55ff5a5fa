"""Contents of one street, in the order in which they have to be drawn.

Things stand in bands along the street that do not overlap (own lane, lanes, cycle path, parking, kerb, sidewalk,
frontage). A ray from the camera leaves the street outwards, so a thing in an outer band never covers one in an inner
band: bands are drawn from the outside in, and within a band from far to near.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from iccld.demo.scenes import people, street, vehicles
from iccld.demo.scenes.canvas import Canvas
from iccld.demo.scenes.world import World


@dataclass(frozen=True)
class Placed:
    """Thing in the street: its band (distance from the own lane's middle), its near end, and how it is drawn."""

    band: float
    z: float
    draw: Callable[[Canvas], None]


@dataclass
class StreetLayout:
    """Cross-section of a street and the things in it."""

    street: street.Street
    cycle: tuple[float, float]  # middles of the cycle paths
    parking: tuple[float | None, float | None]  # middles of the rows of parked cars
    crossing: float | None
    placed: list[Placed] = field(default_factory=list)
    shadows: list[tuple[float, tuple[float, float]]] = field(default_factory=list)  # of houses: x, range of z
    side_streets: list[tuple[int, tuple[float, float]]] = field(default_factory=list)

    @property
    def bands(self) -> list[float]:
        """Return the middles of all bands of the road."""
        return [*self.street.lanes, *self.cycle, *(x for x in self.parking if x is not None)]

    def add(self, band: float, z: float, draw: Callable[[Canvas], None]) -> None:
        self.placed.append(Placed(abs(band), z, draw))

    def draw(self, canvas: Canvas, rng: np.random.Generator) -> None:
        """Draw from far to near: horizon, ground, cast shadows, then everything that stands."""
        street.skyline(canvas, rng)
        street.ground(canvas, rng, self.street, self.crossing)
        for side, z in self.side_streets:
            street.side_street(canvas, self.street, side, z)
        for x, z in self.shadows:
            if x * canvas.light.shadow_shift < 0:
                canvas.shadow((x, x), z, min(abs(x), SHADOW) / abs(canvas.light.shadow_shift))
        for thing in sorted(self.placed, key=lambda thing: (-thing.band, -thing.z)):
            thing.draw(canvas)


DRIVEN = {"car": vehicles.car, "truck": vehicles.truck, "bus": vehicles.bus}
LENGTHS = {"car": 4.3, "truck": 8.0, "bus": 10.0, "tram": 22.0, "motorcycle": 1.5}
PARKING, CYCLE, LANE = 2.2, 1.3, 3.2
KERB_GAP = 1.5  # between signs, trees and lamps
SHADOW = 6.0  # metres that a house's shadow reaches at most: the street is never all in shade


def street_layout(world: World, rng: np.random.Generator) -> StreetLayout:
    """Lay out everything of one street except light and camera."""
    extra = int(rng.integers(world.lanes[0], world.lanes[1] + 1))
    left = extra - int(rng.random() < 0.35) if extra > 1 else extra
    lanes = tuple(LANE * i for i in range(-left, extra - left + 1))
    cycle = (lanes[0] - (LANE + CYCLE) / 2, lanes[-1] + (LANE + CYCLE) / 2)
    edges = (cycle[0] - CYCLE / 2, cycle[1] + CYCLE / 2)
    rows = [edge + _outward(side) * PARKING / 2 if rng.random() < world.parking else None
            for side, edge in enumerate(edges)]  # fmt: skip
    road = (edges[0] - PARKING * (rows[0] is not None), edges[1] + PARKING * (rows[1] is not None))
    walks, verges = rng.uniform(*world.sidewalk, size=2), rng.uniform(*world.verge, size=2)
    kerb = (road[0] - float(walks[0]), road[1] + float(walks[1]))
    front = (kerb[0] - float(verges[0]), kerb[1] + float(verges[1]))
    track = lanes[0] if left and rng.random() < world.tram else None
    crossing = float(rng.uniform(8, 14)) if rng.random() < world.lights else None
    result = StreetLayout(street.Street(road, kerb, front, lanes, track), cycle, (rows[0], rows[1]), crossing)
    for side in (0, 1):
        _frontage(result, world, rng, side)
        _kerb(result, world, rng, side)
        _sidewalk(result, world, rng, side)
    _traffic(result, world, rng)
    _crossing(result, rng)
    return result


def _outward(side: int) -> int:
    return 2 * side - 1


def _frontage(result: StreetLayout, world: World, rng: np.random.Generator, side: int) -> None:
    names, weights = list(world.frontage), np.array(list(world.frontage.values()))
    x, z = result.street.front[side], float(rng.uniform(2.0, 5.0))
    while z < street.FAR:
        length = float(rng.uniform(8, 18)) * (1 + z / 60)
        span = (z, z + length)
        kind = names[int(np.searchsorted(np.cumsum(weights / weights.sum()), rng.random()))]
        if kind == "building":
            _house(result, world, rng, x, 0.0, span)
            result.shadows.append((x, span))
        elif kind in ("wall", "fence"):
            barrier = street.wall if kind == "wall" else street.fence
            result.add(x, z, partial(barrier, rng=rng, x=x, z=span))
            _behind(result, world, rng, x, span)
        elif kind == "trees":
            result.add(x, z, partial(street.hedge, rng=rng, x=x, z=span))
            _grove(result, rng, x, 3.5, span)
        elif z > 12 and rng.random() < 0.6:
            result.side_streets.append((side, (z + 1, z + length - 1)))
        elif rng.random() < 0.5:
            _grove(result, rng, x, 6.0, (z + length / 2, z + length))
        z += length


def _house(result: StreetLayout, world: World, rng: np.random.Generator, x: float, back: float,
           span: tuple[float, float]) -> None:  # fmt: skip
    """Place a house `back` metres behind the frontage line x; things before it in the same span are drawn later."""
    floors = int(rng.integers(world.floors[0], world.floors[1] + 1))
    at = x + back * float(np.sign(x))
    result.add(x, span[0] + 0.01 * back, partial(street.building, rng=rng, x=at, z=span, floors=floors))


def _behind(result: StreetLayout, world: World, rng: np.random.Generator, x: float, span: tuple[float, float]) -> None:
    draw = rng.random()
    if draw < 0.35:
        _house(result, world, rng, x, 5.0, span)
    elif draw < 0.75:
        _grove(result, rng, x, 5.0, span)


def _grove(result: StreetLayout, rng: np.random.Generator, x: float, back: float, span: tuple[float, float]) -> None:
    for z in np.arange(span[0] + 1, span[1], 4.5).tolist():
        at, size = x + float(np.sign(x)) * (back + float(rng.uniform(0, 3))), float(rng.uniform(1.0, 1.9))
        result.add(x, z, partial(street.tree, rng=rng, x=at, z=z, size=size))


def _kerb(result: StreetLayout, world: World, rng: np.random.Generator, side: int) -> None:
    x, spacing = result.street.road[side] + 0.5 * _outward(side), float(rng.uniform(*world.lamp_spacing))
    taken = np.arange(float(rng.uniform(5, 5 + spacing)), 60, spacing).tolist()
    for z in taken:
        result.add(x, z, partial(street.lamp, x=x, z=z))
    for kind, mean, span in ((street.traffic_sign, world.signs, 15), (street.tree, world.trees, 28)):
        for _, z in _scatter(rng, mean / 2, (x, x), span=span):
            if min(abs(z - other) for other in taken) > KERB_GAP:
                taken.append(z)
                result.add(x, z, partial(kind, rng=rng, x=x, z=z))
    parked = x + 0.5 * _outward(side)
    for _, z in _scatter(rng, world.parked_motorcycles / 2, (parked, parked), span=10):
        result.add(x, z, partial(people.motorcycle, rng=rng, x=parked, z=z, turn=_heading(rng)))
    if result.crossing is not None:
        lit, z = int(rng.integers(3)), result.crossing + 1.8
        result.add(x, z, partial(street.traffic_light, rng=rng, x=x, z=z, lit=lit))


def _heading(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.55, 1.0)) * (1 if rng.random() < 0.5 else -1)


def _scatter(
    rng: np.random.Generator, mean: float, across: tuple[float, float], *, span: float
) -> list[tuple[float, float]]:
    """Draw (x, z) of a Poisson number of things, dense at the distance where x comes into view, then thinning out."""
    count = int(rng.poisson(mean))
    x = rng.uniform(min(across), max(across), size=count)
    z = np.maximum(6.0, 1.5 * np.abs(x)) + span * rng.random(count) ** 2
    return list(zip(x.tolist(), z.tolist(), strict=True))


def _sidewalk(result: StreetLayout, world: World, rng: np.random.Generator, side: int) -> None:
    across = (result.street.road[side] + 1.2 * _outward(side), result.street.kerb[side])
    for x, z in _scatter(rng, world.people / 2, across, span=14):
        result.add(across[1], z, partial(people.person, rng=rng, x=x, z=z))
    for x, z in _scatter(rng, world.parked_bicycles / 2, across, span=10):
        result.add(across[1], z, partial(people.bicycle, rng=rng, x=x, z=z, turn=_heading(rng)))


def _traffic(result: StreetLayout, world: World, rng: np.random.Generator) -> None:
    start = 7.0 if result.crossing is None else result.crossing + 2.5
    for x in result.street.lanes:
        _lane(result, world, rng, x, start + float(rng.uniform(0, 9)))
    for side in (0, 1):
        x, row = result.cycle[side], result.parking[side]
        for _, z in _scatter(rng, world.riders / 2, (x, x), span=12):
            turn = float(rng.uniform(0.2, 0.75)) * (1 if rng.random() < 0.5 else -1)
            motor = bool(rng.random() < 0.25)
            result.add(x, z, partial(people.rider, rng=rng, x=x, z=z, turn=turn, motor=motor))
        if row is not None:
            _parked(result, rng, row, oncoming=side == 0)


def _lane(result: StreetLayout, world: World, rng: np.random.Generator, x: float, z: float) -> None:
    names, weights = list(world.traffic), np.array(list(world.traffic.values()))
    oncoming = x < 0
    if x == result.street.track:
        result.add(x, z, partial(vehicles.tram, rng=rng, x=x, z=z))
        z += LENGTHS["tram"] + 8
    while z < 60:
        kind, at = names[int(np.searchsorted(np.cumsum(weights / weights.sum()), rng.random()))], x
        if kind == "motorcycle":
            turn = float(rng.uniform(0.3, 0.6)) * (1 if rng.random() < 0.5 else -1)
            draw = partial(people.rider, rng=rng, x=at, z=z, turn=turn, motor=True)
        else:
            at += float(rng.uniform(-0.25, 0.25))
            draw = partial(DRIVEN[kind], rng=rng, x=at, z=z, oncoming=oncoming)
        result.add(x, z, draw)
        z += LENGTHS[kind] + float(rng.uniform(*world.headway))


def _parked(result: StreetLayout, rng: np.random.Generator, x: float, *, oncoming: bool) -> None:
    z = float(rng.uniform(5, 12))
    while z < 45:
        result.add(x, z, partial(vehicles.car, rng=rng, x=x, z=z, oncoming=oncoming))
        z += LENGTHS["car"] + float(rng.uniform(1.0, 9.0))


def _crossing(result: StreetLayout, rng: np.random.Generator) -> None:
    """Place pedestrians on the zebra, each in the band that it walks in."""
    if result.crossing is None:
        return
    for _ in range(int(rng.poisson(1.5))):
        x = float(rng.uniform(*result.street.road))
        band = min(result.bands, key=lambda middle: abs(middle - x))
        at = result.crossing + float(rng.uniform(-1, 1))
        result.add(band, at, partial(people.person, rng=rng, x=x, z=at))
