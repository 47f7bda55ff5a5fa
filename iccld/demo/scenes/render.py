"""One labelled image of a domain, as a function of its number."""

import numpy as np

from iccld.demo.scenes.appearance import illumination, photograph, sky
from iccld.demo.scenes.canvas import Camera, Canvas
from iccld.demo.scenes.layout import street_layout
from iccld.demo.scenes.world import LOOKS, WORLDS, Domain
from iccld.rng import numpy_generator

MIN_SIZE = 32


def render(
    *, seed: int, domain: Domain, number: int, height: int = 256, width: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """Draw image `number` of a domain; it is equal for equal arguments.

    Returns the image, `(height, width, 3)` uint8 RGB, and its labels, `(height, width)` uint8 train ids 0-18; the
    labels' edges are hard where the image's are soft.
    """
    for name, size in (("height", height), ("width", width)):
        if size < MIN_SIZE:
            raise ValueError(f"scenes.{name}={size} must be at least {MIN_SIZE}; the demo draws 128x256.")
    rng = numpy_generator(seed, f"scenes/{domain.value}", number)
    world, look = WORLDS[domain], LOOKS[domain]
    camera = Camera(
        width=width, height=height, focal=rng.uniform(*world.focal) * width,
        centre=width * rng.uniform(0.42, 0.58), horizon=height * rng.uniform(*world.horizon),
        mount=rng.uniform(*world.mount),
    )  # fmt: skip
    background = sky(look, rng, height=height, width=width, horizon=camera.horizon)
    canvas = Canvas(background, camera, illumination(look, rng))
    street_layout(world, rng).draw(canvas, rng)
    labels = np.array(canvas.labels)
    if look.photograph:
        return photograph(canvas.picture, labels, rng), labels
    return np.array(canvas.picture), labels
