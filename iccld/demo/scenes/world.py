"""Numbers of the two domains: what their streets are made of, and how light and camera show them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

Range = tuple[float, float]
Colour = tuple[float, float, float]


class Domain(Enum):
    """`game` is clean, saturated and flatly shaded; `camera` is a photograph of streets with other statistics."""

    GAME = "game"
    CAMERA = "camera"


@dataclass(frozen=True)
class World:
    """Contents of a domain's streets. Lengths are in metres; ranges are drawn from uniformly.

    Weights are normalised, and counts are Poisson means.
    """

    mount: Range  # the camera above the road
    horizon: Range  # as a fraction of the image's height
    focal: Range  # as a fraction of the image's width
    lanes: tuple[int, int]  # besides the own lane, on both sides together
    sidewalk: Range
    verge: Range  # terrain between sidewalk and frontage
    frontage: Mapping[str, float]  # weights of what lines the street
    floors: tuple[int, int]
    traffic: Mapping[str, float]  # weights of what drives
    headway: Range  # between two vehicles of a lane
    parking: float  # probability of a row of parked cars, a side
    tram: float  # probability of a track with a tram on it
    people: float
    riders: float
    parked_bicycles: float
    parked_motorcycles: float
    trees: float  # along the kerb
    lamp_spacing: Range
    signs: float
    lights: float  # probability of a crossing with traffic lights


@dataclass(frozen=True)
class Look:
    """Appearance of the same street: colours of 0-255, light as factors on them."""

    saturation: Range
    exposure: Range
    contrast_of_faces: Range  # how much darker a face in shade is
    visibility: Range  # metres after which 63 % of the colour is haze
    haze: Colour
    sky: tuple[Colour, Colour]  # zenith and horizon
    shadow: Range  # opacity of cast shadows, 0-1
    photograph: bool  # texture, cast, vignette, blur and noise


WORLDS: Mapping[Domain, World] = {
    Domain.GAME: World(
        mount=(1.9, 2.5), horizon=(0.36, 0.43), focal=(0.64, 0.78), lanes=(1, 2), sidewalk=(2.5, 4.5), verge=(1.0, 6.0),
        frontage={"building": 0.30, "wall": 0.20, "fence": 0.20, "trees": 0.13, "open": 0.17}, floors=(2, 6),
        traffic={"car": 0.56, "truck": 0.18, "bus": 0.13, "motorcycle": 0.13}, headway=(8.0, 24.0), parking=0.25,
        tram=0.26, people=3.5, riders=0.9, parked_bicycles=1.0, parked_motorcycles=0.8, trees=1.2,
        lamp_spacing=(11.0, 18.0), signs=3.0, lights=0.55,
    ),
    Domain.CAMERA: World(
        mount=(1.5, 1.9), horizon=(0.42, 0.48), focal=(0.72, 0.88), lanes=(1, 2), sidewalk=(3.5, 5.5), verge=(1.5, 4.5),
        frontage={"building": 0.34, "wall": 0.22, "fence": 0.20, "trees": 0.15, "open": 0.09}, floors=(3, 6),
        traffic={"car": 0.62, "truck": 0.15, "bus": 0.14, "motorcycle": 0.09}, headway=(8.0, 22.0), parking=0.4,
        tram=0.26, people=9.0, riders=1.6, parked_bicycles=1.8, parked_motorcycles=0.8, trees=1.8,
        lamp_spacing=(10.0, 16.0), signs=4.0, lights=0.55,
    ),
}  # fmt: skip

LOOKS: Mapping[Domain, Look] = {
    Domain.GAME: Look(
        saturation=(1.15, 1.4), exposure=(0.95, 1.1), contrast_of_faces=(0.12, 0.2), visibility=(math.inf, math.inf),
        haze=(200, 215, 235), sky=((60, 130, 230), (150, 200, 250)), shadow=(0.15, 0.25), photograph=False,
    ),
    Domain.CAMERA: Look(
        saturation=(0.7, 0.95), exposure=(0.85, 1.05), contrast_of_faces=(0.25, 0.45), visibility=(80.0, 160.0),
        haze=(196, 202, 206), sky=((112, 156, 216), (200, 216, 232)), shadow=(0.3, 0.5), photograph=True,
    ),
}  # fmt: skip
