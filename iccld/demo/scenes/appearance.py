"""Light, sky, and the marks of a camera on a picture."""

import functools

import numpy as np
from PIL import Image, ImageFilter

from iccld.demo.scenes.canvas import Light
from iccld.demo.scenes.world import Look

# How rough each class is: the amplitude of the texture that multiplies its colour, by train id.
_ROUGHNESS = np.full(256, 0.08, np.float32)
_ROUGHNESS[[0, 1, 2, 3, 8, 9, 10]] = (0.12, 0.08, 0.13, 0.08, 0.36, 0.30, 0.03)


def illumination(look: Look, rng: np.random.Generator) -> Light:
    """Draw the light of one image: the sun stands to the left or to the right."""
    exposure, shade = rng.uniform(*look.exposure), rng.uniform(*look.contrast_of_faces)
    sun_left = rng.random() < 0.5
    bright, dark = 1.0, 1.0 - shade
    low, high = look.visibility
    return Light(
        saturation=rng.uniform(*look.saturation), exposure=exposure,
        left=bright if sun_left else dark, right=dark if sun_left else bright, front=1.0 - shade / 2,
        visibility=low if low == high else rng.uniform(low, high), haze=look.haze, shadow=rng.uniform(*look.shadow),
        shadow_shift=(1 if sun_left else -1) * rng.uniform(0.25, 0.6),
    )  # fmt: skip


def sky(look: Look, rng: np.random.Generator, *, height: int, width: int, horizon: float) -> Image.Image:
    """Draw a vertical gradient with clouds: hard-edged ones in a drawing, soft ones in a photograph."""
    rows = min(height, int(horizon) + 2)
    ramp = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
    clouds = _smooth_noise(rng, rows, width, (6, 7))
    clouds = np.clip(clouds, 0, 1) if look.photograph else (clouds > 0.8).astype(np.float32)
    clouds *= 0.7 * (1 - ramp)
    image = Image.new("RGB", (width, height))
    field = np.empty((rows, width, 3), np.uint8)
    for channel, (zenith, low) in enumerate(zip(*look.sky, strict=True)):
        clear = zenith + (low - zenith) * ramp
        field[..., channel] = clear + (250 - clear) * clouds
    image.paste(Image.fromarray(field))
    return image


def _smooth_noise(rng: np.random.Generator, height: int, width: int, grid: tuple[int, int]) -> np.ndarray:
    """Draw `(height, width)` float32 of unit variance at the nodes of a coarse grid (rows, columns)."""
    coarse = Image.fromarray(rng.standard_normal(grid, dtype=np.float32))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


@functools.lru_cache(maxsize=8)
def _vignette(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return (1 - 0.10 * (x**2 + y**2) ** 1.2).astype(np.float32)[..., None]


def photograph(picture: Image.Image, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn a picture `(H, W, 3)` uint8 into a camera's: texture, uneven light, tone and cast, blur, vignette, noise."""
    height, width = labels.shape
    textured = _textured(np.asarray(picture), labels, rng)
    toned = Image.fromarray(textured).point(_tone_curves(rng))
    soft = np.asarray(toned.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 0.7) * height / 256)))
    # One field of noise serves the three channels at different offsets, which keeps them uncorrelated.
    amount = rng.uniform(2.5, 6.0)
    noise = amount * rng.standard_normal(height * width + 2 * width, dtype=np.float32)
    channels = [noise[i * width : i * width + height * width].reshape(height, width) for i in range(3)]
    image = soft * _vignette(height, width)
    for channel, field in enumerate(channels):
        image[..., channel] += field
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def _textured(image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Multiply each class's pixels by noise of its own roughness, and all by slow changes of light."""
    height, width = labels.shape
    texture = 0.5 * _smooth_noise(rng, height, width, (height // 16, width // 16))
    texture += 0.7 * _smooth_noise(rng, height, width, (height // 3, width // 3))
    texture += 0.5 * rng.standard_normal((height, width), dtype=np.float32)
    texture *= _ROUGHNESS[labels]
    texture += 0.08 * _smooth_noise(rng, height, width, (3, 4)) + 1
    return np.clip(image * texture[..., None], 0, 255).astype(np.uint8)


def _tone_curves(rng: np.random.Generator) -> list[int]:
    """Make a lookup table of 3 x 256 levels: gamma, colour cast and lifted blacks."""
    warm, gamma = rng.uniform(-0.06, 0.06), rng.uniform(0.85, 1.2)
    level = np.linspace(0, 1, 256) ** gamma
    gains, lifts = (0.88 + warm, 1.0, 0.90 - warm), (0.02, 0.05, 0.04)
    curves = [255 * (lift + (0.97 - lift) * gain * level) for gain, lift in zip(gains, lifts, strict=True)]
    return np.concatenate(curves).astype(int).tolist()
