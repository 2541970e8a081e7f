"""What a tiny picture can show: things with five attributes on a background, and how they are drawn at random.

A combination of shape, colour, size, position and background belongs to exactly one side of the train / held-out
split, decided by its hash; every thing of a held-out picture is a combination that no training picture holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from random import Random

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
SIZES = ("small", "big")
POSITIONS = (
    *("upper left", "top", "upper right"),
    *("left", "middle", "right"),
    *("lower left", "bottom", "lower right"),
)
"""Cells of a 3 × 3 grid in reading order."""
BACKGROUNDS = ("sky", "night", "grass", "sand", "snow")
MOST_THINGS = 2
"""In one scene."""

SPLITS = ("train", "validation", "test")
HELD_OUT_PERCENT = 20
_MAX_TRIES = 10_000
_SECOND_TRIES = 200


@dataclass(frozen=True)
class Thing:
    """One object: values of :data:`SHAPES`, :data:`COLOURS`, :data:`SIZES` and :data:`POSITIONS`."""

    shape: str
    colour: str
    size: str
    position: str


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; the first is the main one."""

    things: tuple[Thing, ...]
    background: str

    @property
    def main(self) -> Thing:
        """The thing that captions and stories are about."""
        return self.things[0]

    def with_main(self, **changes: str) -> Scene:
        """Return the scene with some attributes of its main thing changed."""
        return replace(self, things=(replace(self.main, **changes), *self.things[1:]))


def seeded(seed: int, split: str, *index: int | str) -> Random:
    """Return the random source of one record: the same record whatever else is made."""
    return Random(":".join(map(str, (seed, split, *index))))


@cache
def is_held_out(thing: Thing, background: str) -> bool:
    """Whether the combination is kept from training (about one in five is)."""
    key = "|".join((thing.shape, thing.colour, thing.size, thing.position, background))
    return int.from_bytes(sha256(key.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def belongs(scene: Scene, split: str) -> bool:
    """Whether every thing of the scene is a combination of ``split`` (validation and test are held out)."""
    return all(is_held_out(thing, scene.background) == (split != "train") for thing in scene.things)


def apart(first: str, second: str) -> bool:
    """Whether two positions are neither the same nor side by side, so that big things do not touch."""
    (row, column), (other_row, other_column) = grid_cell(first), grid_cell(second)
    return abs(row - other_row) + abs(column - other_column) >= 2


def grid_cell(position: str) -> tuple[int, int]:
    """Return the row and column (0 to 2) of a position."""
    row, column = divmod(POSITIONS.index(position), 3)
    return row, column


def random_thing(rng: Random) -> Thing:
    """Draw every attribute uniformly."""
    return Thing(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES), rng.choice(POSITIONS))


def random_scene(rng: Random, split: str, things: int = 1) -> Scene:
    """Draw a scene of ``split`` with one or two things; two differ in shape and stand apart.

    Raises:
        ValueError: an unknown split or another number of things.
    """
    if split not in SPLITS or things not in (1, 2):
        raise ValueError(f"no scene of {things} things in split {split!r}; splits are {', '.join(SPLITS)}")
    for _ in range(_MAX_TRIES):
        scene = Scene((random_thing(rng),), rng.choice(BACKGROUNDS))
        if not belongs(scene, split):
            continue
        if things == 1:
            return scene
        second = random_second(rng, scene, split)
        if second is not None:
            return second
    raise AssertionError(f"no scene of split {split} found")


def random_second(rng: Random, scene: Scene, split: str) -> Scene | None:
    """Return ``scene`` with a second thing of another shape and colour, apart from the first, or None."""
    main = scene.main
    for _ in range(_SECOND_TRIES):
        thing = random_thing(rng)
        both = Scene((main, thing), scene.background)
        differs = thing.shape != main.shape and thing.colour != main.colour
        if differs and apart(thing.position, main.position) and belongs(both, split):
            return both
    return None
