"""Scene → picture: anti-aliased shapes on lightly textured backgrounds, with jitter from a given random source."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from minigpt5.tinyworld.scenes import Scene, Thing, grid_cell

PICTURE_SIZE = 64
CELL_CENTRES = (11.5, 32.0, 52.5)
"""Centre of a grid row or column, in pixels."""
RADII = {"small": 6.5, "big": 9.8}
"""Half the extent of a thing, in pixels."""
COLOUR_VALUES = {
    "red": (218, 32, 36),
    "orange": (250, 138, 10),
    "yellow": (252, 222, 30),
    "green": (10, 122, 48),
    "blue": (28, 74, 224),
    "purple": (134, 38, 178),
    "pink": (252, 118, 186),
    "brown": (136, 76, 34),
}
BACKGROUND_VALUES = {
    "sky": ((140, 198, 246), (206, 232, 252)),
    "night": ((14, 16, 44), (40, 42, 86)),
    "grass": ((182, 222, 136), (150, 200, 100)),
    "sand": ((244, 226, 184), (228, 200, 146)),
    "snow": ((250, 251, 254), (226, 232, 240)),
}
"""RGB at the top and at the bottom row."""
_OVERSAMPLING = 4
_POSITION_JITTER = 0.75
_SIZE_JITTER = 0.05
_SHADE_JITTER = 9

FloatArray = NDArray[np.float64]
Point = tuple[float, float]


@dataclass(frozen=True)
class Jitter:
    """Small differences between two pictures of the same thing: offset in pixels, relative size, RGB shift."""

    offset: Point = (0.0, 0.0)
    scale: float = 1.0
    shade: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def draw(cls, rng: Random) -> "Jitter":
        """Draw each difference uniformly."""
        offset = (rng.uniform(-1, 1) * _POSITION_JITTER, rng.uniform(-1, 1) * _POSITION_JITTER)
        scale = 1 + rng.uniform(-1, 1) * _SIZE_JITTER
        red, green, blue = (rng.uniform(-1, 1) * _SHADE_JITTER for _ in range(3))
        return cls(offset, scale, (red, green, blue))


def render(scene: Scene, rng: Random) -> Image.Image:
    """Return the scene as a 64 × 64 RGB picture; ``rng`` decides jitter and texture only."""
    canvas = background_gradient(scene.background) + _texture(scene.background, rng)
    for thing in scene.things:
        jitter = Jitter.draw(rng)
        alpha = thing_mask(thing, jitter)[..., None]
        colour = np.array(COLOUR_VALUES[thing.colour]) + np.array(jitter.shade)
        canvas = canvas * (1 - alpha) + colour * alpha
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


def background_gradient(background: str) -> FloatArray:
    """Return a background without texture, ``[64, 64, 3]`` in 0 to 255."""
    top, bottom = (np.array(value, dtype=np.float64) for value in BACKGROUND_VALUES[background])
    depth = np.linspace(0, 1, PICTURE_SIZE)[:, None, None]
    return np.broadcast_to(top + (bottom - top) * depth, (PICTURE_SIZE, PICTURE_SIZE, 3)).copy()


def thing_mask(thing: Thing, jitter: Jitter | None = None) -> FloatArray:
    """Return how much of each pixel the thing covers, ``[64, 64]`` in 0 to 1."""
    jitter = jitter or Jitter()
    row, column = grid_cell(thing.position)
    centre = (CELL_CENTRES[column] + jitter.offset[0], CELL_CENTRES[row] + jitter.offset[1])
    return shape_mask(thing.shape, centre, RADII[thing.size] * jitter.scale, PICTURE_SIZE)


def shape_mask(shape: str, centre: Point, radius: float, side: int) -> FloatArray:
    """Return a shape's coverage of the pixels of a square of ``side`` pixels; all lengths in pixels."""
    factor = _OVERSAMPLING
    mask = Image.new("L", (side * factor, side * factor), 0)
    x, y = centre[0] * factor, centre[1] * factor
    _SHAPE_PAINTERS[shape](ImageDraw.Draw(mask), x, y, radius * factor)
    small = mask.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def _texture(background: str, rng: Random) -> FloatArray:
    """Return a faint texture that tells backgrounds apart beyond their colour, ``[64, 64, 3]``."""
    noise = np.random.default_rng(rng.getrandbits(64))
    side = PICTURE_SIZE
    grain = noise.normal(0, 1, (side, side))
    if background == "sky":
        return _clouds(noise)[..., None] * np.array((26.0, 16.0, 4.0))
    if background == "night":
        stars = (noise.random((side, side)) < 0.008) * noise.uniform(25, 60, (side, side))
        return np.repeat((stars + grain)[..., None], 3, axis=2)
    if background == "grass":
        blades = (grain + np.roll(grain, 1, axis=0) + np.roll(grain, 2, axis=0)) / 2
        return np.clip(blades, -2, 2)[..., None] * np.array((5.0, 3.5, 4.0))
    if background == "sand":
        return np.clip(grain, -2, 2)[..., None] * np.array((4.5, 4.0, 3.5))
    drifts = np.sin(np.linspace(0, 3 * math.pi, side) + noise.uniform(0, 6))[None, :]
    rows = np.sin(np.linspace(0, 5 * math.pi, side) + noise.uniform(0, 6))[:, None]
    return (drifts * rows)[..., None] * np.array((4.0, 3.0, 1.5)) + grain[..., None]


def _clouds(noise: np.random.Generator) -> FloatArray:
    """Return two or three soft, flat clouds as coverage in 0 to 1."""
    rows, columns = np.mgrid[0:PICTURE_SIZE, 0:PICTURE_SIZE].astype(np.float64)
    cover = np.zeros((PICTURE_SIZE, PICTURE_SIZE))
    for _ in range(int(noise.integers(2, 4))):
        x, y = noise.uniform(4, 60, 2)
        width, height = noise.uniform(8, 13), noise.uniform(2.5, 4)
        cover = np.maximum(cover, np.exp(-(((columns - x) / width) ** 2) - ((rows - y) / height) ** 2))
    return cover


def _circle(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


def _ring(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    _circle(draw, x, y, radius)
    hole = radius * 0.55
    draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)


def _cross(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    bar = radius * 0.34
    draw.rectangle((x - radius, y - bar, x + radius, y + bar), fill=255)
    draw.rectangle((x - bar, y - radius, x + bar, y + radius), fill=255)


def _heart(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    points = []
    for step in range(64):
        angle = 2 * math.pi * step / 64
        across = math.sin(angle) ** 3
        up = (13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)) / 16
        points.append((x + radius * across, y - radius * (up + 0.12)))
    draw.polygon(points, fill=255)


def _polygon(corners: list[Point]) -> Callable[[ImageDraw.ImageDraw, float, float, float], None]:
    """Return a painter of a polygon given in units of the radius, y downwards."""

    def paint(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
        draw.polygon([(x + radius * across, y + radius * down) for across, down in corners], fill=255)

    return paint


def _star_corners() -> list[Point]:
    angles = [-math.pi / 2 + math.pi * corner / 5 for corner in range(10)]
    lengths = [1.08 if corner % 2 == 0 else 0.46 for corner in range(10)]
    return [
        (length * math.cos(angle), length * math.sin(angle) + 0.08)
        for angle, length in zip(angles, lengths, strict=True)
    ]


_SHAPE_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, float, float, float], None]] = {
    "circle": _circle,
    "square": _polygon([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
    "triangle": _polygon([(0, -0.95), (1.02, 0.85), (-1.02, 0.85)]),
    "star": _polygon(_star_corners()),
    "ring": _ring,
    "cross": _cross,
    "diamond": _polygon([(0, -1.05), (0.8, 0), (0, 1.05), (-0.8, 0)]),
    "heart": _heart,
}
