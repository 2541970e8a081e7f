"""Picture → scene, by plain image processing: the tiny world's own measure of what a picture shows.

Exact on rendered pictures, also after JPEG; on blurred, noisy or generated ones it returns the nearest guess.
Shapes: Y rows and X columns (64 each), K a normalised patch's side.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minigpt5.tinyworld.renderer import (
    CELL_CENTRES,
    COLOUR_VALUES,
    PICTURE_SIZE,
    RADII,
    background_gradient,
    shape_mask,
)
from minigpt5.tinyworld.scenes import BACKGROUNDS, COLOURS, MOST_THINGS, POSITIONS, SHAPES, SIZES, Scene, Thing

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_MIN_DISTANCE = 45.0
"""RGB distance from the background at which a pixel may belong to a thing; textures stay below it."""
_MIN_AREA = 12.0
"""Pixels that a further thing covers at least; the smallest one rendered covers about 45."""
_BLUR_PENALTY = 60.0
"""RGB distance that a wholly transparent colour would be charged; small blurred rings are about 0.8 opaque."""
_PATCH_SIDE = 24
_PATCH_REACH = 2.4
"""Half the side of a normalised patch, in root-mean-square radii of the shape."""


@dataclass(frozen=True)
class Agreement:
    """Which attributes of the wanted main thing and background a picture shows."""

    shape: bool
    colour: bool
    size: bool
    position: bool
    background: bool

    @property
    def all(self) -> bool:
        """Whether everything agrees."""
        return all(self.as_dict().values())

    def as_dict(self) -> dict[str, bool]:
        """Return attribute → whether it agrees."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def recognise(picture: Image.Image, most_things: int = MOST_THINGS) -> Scene:
    """Read a scene back from a picture.

    Args:
        picture: any size and mode; it is resized to 64 × 64 RGB.
        most_things: that are looked for.

    Returns:
        The nearest scene: one or more things, larger area first, and the background. A picture without any
        object still gives the thing that its largest deviation from the background resembles most.
    """
    pixels_YX3 = _to_pixels(picture)
    background, canvas_YX3 = _find_background(pixels_YX3)
    distance_YX = np.linalg.norm(pixels_YX3 - canvas_YX3, axis=2)
    blobs = _find_blobs(_smooth(distance_YX), most_things)
    return Scene(tuple(_identify(pixels_YX3, canvas_YX3, blob_YX) for blob_YX in blobs), background)


def compare(wanted: Scene, found: Scene) -> Agreement:
    """Check the wanted main thing against the found one that is most like it."""
    names = ("shape", "colour", "size", "position")
    checks = [
        {name: getattr(thing, name) == getattr(wanted.main, name) for name in names} for thing in found.things
    ]
    best: Mapping[str, bool] = max(checks, key=lambda check: sum(check.values()))
    return Agreement(**best, background=found.background == wanted.background)


def shows_things(wanted: Scene, found: Scene) -> bool:
    """Whether the found things are the wanted ones, in every attribute, and no other; on whatever background.

    Args:
        wanted: what a picture should show.
        found: what was recognised in it, where at least one thing more than wanted was looked for.
    """
    return Counter(found.things) == Counter(wanted.things)


def _to_pixels(picture: Image.Image) -> FloatArray:
    picture = picture.convert("RGB")
    if picture.size != (PICTURE_SIZE, PICTURE_SIZE):
        picture = picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float64)


def _find_background(pixels_YX3: FloatArray) -> tuple[str, FloatArray]:
    """Return the background whose gradient most pixels follow, and that gradient shifted to fit them."""
    gradients = {name: background_gradient(name) for name in BACKGROUNDS}
    misfits = {
        name: float(np.median(np.linalg.norm(pixels_YX3 - gradient, axis=2)))
        for name, gradient in gradients.items()
    }
    name = min(misfits, key=misfits.__getitem__)
    shift = np.median(pixels_YX3 - gradients[name], axis=(0, 1))
    return name, gradients[name] + shift


def _smooth(values_YX: FloatArray) -> FloatArray:
    """Average 3 × 3 pixels, so that single bright pixels (stars, noise) count little."""
    padded = np.pad(values_YX, 1, mode="edge")
    rows, columns = values_YX.shape
    return np.mean([padded[y : y + rows, x : x + columns] for y in range(3) for x in range(3)], axis=0)


def _find_blobs(distance_YX: FloatArray, most: int) -> list[BoolArray]:
    """Return the regions of at most so many things, larger first, and at least one region."""
    threshold = min(_MIN_DISTANCE, 0.5 * float(distance_YX.max()))
    blobs = sorted(_components(distance_YX > threshold), key=lambda blob: -float(distance_YX[blob].sum()))
    if not blobs:
        return [np.ones_like(distance_YX, dtype=np.bool_)]
    rest = [blob for blob in blobs[1:most] if blob.sum() >= _MIN_AREA]
    return [blobs[0], *rest]


def _components(mask_YX: BoolArray) -> list[BoolArray]:
    """Return the 8-connected regions of a mask."""
    remaining = mask_YX.copy()
    found = []
    while remaining.any():
        region = np.zeros_like(remaining)
        region[tuple(np.argwhere(remaining)[0])] = True
        while True:
            grown = _dilate(region) & remaining
            if (grown == region).all():
                break
            region = grown
        remaining &= ~region
        found.append(region)
    return found


def _dilate(mask_YX: BoolArray, times: int = 1) -> BoolArray:
    for _ in range(times):
        padded = np.pad(mask_YX, 1)
        rows, columns = mask_YX.shape
        mask_YX = np.any([padded[y : y + rows, x : x + columns] for y in range(3) for x in range(3)], axis=0)
    return mask_YX


def _identify(pixels_YX3: FloatArray, canvas_YX3: FloatArray, blob_YX: BoolArray) -> Thing:
    """Return the thing that a region shows.

    The colour is the palette's nearest to the region's most opaque pixels; with the region's own mean colour the
    coverage of every pixel follows, and its moments give position, size and a normalised patch for the shape.
    """
    difference_YX3 = pixels_YX3 - canvas_YX3
    strength_YX = np.linalg.norm(difference_YX3, axis=2)
    core_YX = blob_YX & (strength_YX >= np.quantile(strength_YX[blob_YX], 0.7))
    value = np.median(pixels_YX3[core_YX], axis=0)
    colour = _nearest_colour(value, np.median(canvas_YX3[core_YX], axis=0))
    axis_YX3 = value - canvas_YX3
    coverage_YX = (difference_YX3 * axis_YX3).sum(axis=2) / np.maximum((axis_YX3**2).sum(axis=2), 1.0)
    coverage_YX = np.clip(coverage_YX, 0, 1) * _dilate(blob_YX, 1)
    coverage_YX[coverage_YX < 0.12] = 0
    area = float(coverage_YX.sum())
    centre, radius = _moments(coverage_YX)
    patch_KK = _normalised_patch(coverage_YX, centre, radius)
    shape, size = _nearest_shape(patch_KK, area)
    return Thing(shape, colour, size, _nearest_position(centre))


def _nearest_colour(value: FloatArray, behind: FloatArray) -> str:
    """Return the palette's nearest colour to a value, allowing for some of what is behind shining through."""

    def misfit(name: str) -> float:
        colour = np.array(COLOUR_VALUES[name], dtype=np.float64)
        return min(
            float(np.linalg.norm(behind + opacity * (colour - behind) - value)) + _BLUR_PENALTY * (1 - opacity)
            for opacity in (1.0, 0.9, 0.8, 0.7)
        )

    return min(COLOURS, key=misfit)


def _moments(coverage_YX: FloatArray) -> tuple[tuple[float, float], float]:
    """Return the centroid (x, y) and the root-mean-square radius of a coverage, in pixels."""
    total = max(float(coverage_YX.sum()), 1e-9)
    rows, columns = np.mgrid[0 : coverage_YX.shape[0], 0 : coverage_YX.shape[1]] + 0.5
    x, y = float((coverage_YX * columns).sum() / total), float((coverage_YX * rows).sum() / total)
    spread = (coverage_YX * ((columns - x) ** 2 + (rows - y) ** 2)).sum() / total
    return (x, y), max(float(np.sqrt(spread)), 0.5)


def _normalised_patch(coverage_YX: FloatArray, centre: tuple[float, float], radius: float) -> FloatArray:
    """Sample a coverage on a grid around its centroid, in units of its radius: ``[K, K]``."""
    steps = (np.arange(_PATCH_SIDE) + 0.5) / _PATCH_SIDE * 2 - 1
    xs = centre[0] + steps * _PATCH_REACH * radius - 0.5
    ys = centre[1] + steps * _PATCH_REACH * radius - 0.5
    padded = np.pad(coverage_YX, 1)
    return _bilinear(padded, ys + 1, xs + 1)


def _bilinear(values_YX: FloatArray, ys: FloatArray, xs: FloatArray) -> FloatArray:
    """Sample on the grid of ``ys`` × ``xs``; outside the picture the border's value."""
    ys, xs = (np.clip(places, 0, limit - 1.001) for places, limit in zip((ys, xs), values_YX.shape, strict=True))
    top, left = ys.astype(int), xs.astype(int)
    down, right = (ys - top)[:, None], (xs - left)[None, :]
    corner = values_YX[np.ix_(top, left)] * (1 - right) + values_YX[np.ix_(top, left + 1)] * right
    below = values_YX[np.ix_(top + 1, left)] * (1 - right) + values_YX[np.ix_(top + 1, left + 1)] * right
    return corner * (1 - down) + below * down


@cache
def _templates() -> dict[tuple[str, str], tuple[FloatArray, float]]:
    """Return (shape, size) → its normalised patch and its area in pixels."""
    templates = {}
    middle = PICTURE_SIZE / 2
    for shape in SHAPES:
        for size in SIZES:
            mask_YX = shape_mask(shape, (middle, middle), RADII[size], PICTURE_SIZE)
            patch_KK = _normalised_patch(mask_YX, *_moments(mask_YX))
            templates[shape, size] = patch_KK, float(mask_YX.sum())
    return templates


def _nearest_shape(patch_KK: FloatArray, area: float) -> tuple[str, str]:
    """Return the shape whose patch is nearest, then the size whose area is nearest (by ratio)."""
    templates = _templates()
    shape, _ = min(templates, key=lambda key: float(((templates[key][0] - patch_KK) ** 2).sum()))
    size = min(SIZES, key=lambda name: abs(np.log(max(area, 1e-9) / templates[shape, name][1])))
    return shape, size


def _nearest_position(centre: tuple[float, float]) -> str:
    column, row = (int(np.argmin([abs(place - cell) for cell in CELL_CENTRES])) for place in centre)
    return POSITIONS[row * len(CELL_CENTRES) + column]
