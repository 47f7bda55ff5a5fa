"""A picture and its label map, drawn by the same polygons through one pinhole camera.

Street coordinates are metres: x to the right of the camera, y above the road, z ahead of the camera.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from iccld.demo.scenes.world import Colour

(
    ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN,
    SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE,
) = range(19)  # fmt: skip

Point = tuple[float, float, float]

_CIRCLE = [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 14, endpoint=False).tolist()]


@dataclass(frozen=True)
class Camera:
    """Level pinhole camera; `focal`, `centre` and `horizon` in pixels, `mount` in metres above the road."""

    width: int
    height: int
    focal: float
    centre: float
    horizon: float
    mount: float

    def project(self, point: Point) -> tuple[float, float]:
        """Return column and row of a point with z > 0."""
        x, y, z = point
        scale = self.focal / z
        return self.centre + scale * x, self.horizon + scale * (self.mount - y)

    def pixels(self, length: float, z: float) -> float:
        """Return the size in pixels of a length at distance z."""
        return length * self.focal / z


@dataclass(frozen=True)
class Light:
    """One image's illumination: factors on the colours of faces, haze and cast shadows."""

    saturation: float
    exposure: float
    left: float  # faces that look to the left of the street
    right: float
    front: float  # faces that look at the camera
    visibility: float
    haze: Colour
    shadow: float
    shadow_shift: float  # metres that a shadow reaches sideways for each metre of height

    def shade(self, colour: Colour, z: float, factor: float) -> tuple[int, int, int]:
        """Return the colour as seen from distance z."""
        factor *= self.exposure
        grey = (0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2]) * factor * (1 - self.saturation)
        clear = math.exp(-z / self.visibility)
        gain, veil = self.saturation * factor * clear, 1 - clear
        red, green, blue = (
            min(255, max(0, int(gain * c + clear * grey + veil * h))) for c, h in zip(colour, self.haze, strict=True)
        )
        return red, green, blue


class Canvas:
    """Picture in RGB and `labels` of train ids; a later thing covers what was drawn before."""

    def __init__(self, background: Image.Image, camera: Camera, light: Light) -> None:
        self.camera, self.light = camera, light
        self.picture = background
        self.labels = Image.new("L", background.size, SKY)
        self._paint = ImageDraw.Draw(self.picture, "RGBA")
        self._mark = ImageDraw.Draw(self.labels)

    def face(
        self, points: Sequence[Point], colour: Colour, label: int, *, light: float = 1.0, opacity: float = 1.0
    ) -> None:
        """Draw a polygon in the street. Pixels seen through a part of it (a fence) still have its label."""
        corners = [self.camera.project(point) for point in points]
        fill = self.light.shade(colour, points[0][2], light)
        self._paint.polygon(corners, (*fill, int(255 * opacity)))
        self._mark.polygon(corners, label)

    def upright(self, x: float, z: float, outline: Sequence[tuple[float, float]], colour: Colour, label: int) -> None:
        """Draw a polygon that stands across the street at (x, z); its outline is (sideways, above the road)."""
        self.face([(x + dx, y, z) for dx, y in outline], colour, label, light=self.light.front)

    def disc(
        self, centre: Point, radius: tuple[float, float], colour: Colour, label: int, *, light: float = 1.0
    ) -> None:
        """Draw an ellipse that faces the camera; `radius` is (sideways, upwards)."""
        x, y, z = centre
        outline = [(x + radius[0] * a, y + radius[1] * b, z) for a, b in _CIRCLE]
        self.face(outline, colour, label, light=light * self.light.front)

    def wheel(self, centre: Point, radius: float, colour: Colour, label: int) -> None:
        """Draw a disc in a plane along the street."""
        x, y, z = centre
        self.face([(x, y + radius * b, z + radius * a) for a, b in _CIRCLE], colour, label)

    def limb(self, x: float, z: float, ends: tuple[float, float, float, float], width: float, colour: Colour,
             label: int) -> None:  # fmt: skip
        """Draw a bar of a given width between two points (sideways, up, sideways, up) of the plane at (x, z)."""
        x0, y0, x1, y1 = ends
        length = math.hypot(x1 - x0, y1 - y0) or 1.0
        nx, ny = -(y1 - y0) / length * width / 2, (x1 - x0) / length * width / 2
        outline = [(x0 + nx, y0 + ny), (x1 + nx, y1 + ny), (x1 - nx, y1 - ny), (x0 - nx, y0 - ny)]
        self.upright(x, z, outline, colour, label)

    def box(self, x: Sequence[float], y: Sequence[float], z: Sequence[float], colour: Colour, label: int) -> None:
        """Draw the faces of an upright box that the camera sees; x, y, z are (from, to)."""
        (x0, x1), (y0, y1), (z0, z1) = x, y, z
        if y1 < self.camera.mount:
            self.face([(x0, y1, z0), (x1, y1, z0), (x1, y1, z1), (x0, y1, z1)], colour, label, light=1.08)
        inner, light = self.inner(x0, x1)
        if inner is not None:
            self.face([(inner, y0, z0), (inner, y0, z1), (inner, y1, z1), (inner, y1, z0)], colour, label, light=light)
        self.face([(x0, y0, z0), (x1, y0, z0), (x1, y1, z0), (x0, y1, z0)], colour, label, light=self.light.front)

    def inner(self, x0: float, x1: float) -> tuple[float | None, float]:
        """Return the side, and its light, of a thing between x0 and x1 that the camera sees (None: neither side)."""
        if x0 > 0:
            return x0, self.light.left
        if x1 < 0:
            return x1, self.light.right
        return None, 1.0

    def shadow(self, x: tuple[float, float], z: tuple[float, float], tall: float) -> None:
        """Draw a cast shadow on the ground: it darkens the picture and leaves the labels."""
        shift = self.light.shadow_shift * tall
        x0, x1 = x[0] + min(0.0, shift), x[1] + max(0.0, shift)
        corners = [self.camera.project(p) for p in ((x0, 0, z[0]), (x1, 0, z[0]), (x1, 0, z[1]), (x0, 0, z[1]))]
        self._paint.polygon(corners, (12, 14, 26, int(255 * self.light.shadow)))
