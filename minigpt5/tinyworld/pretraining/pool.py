"""Training pictures rendered once and kept: groups of look-alike scenes, so that a batch holds hard negatives.

Shapes: N pictures of the pool, S side in pixels; 3 is RGB.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt5.data.cc3m import clean_caption
from minigpt5.tinyworld.captions import caption
from minigpt5.tinyworld.renderer import render, thing_mask
from minigpt5.tinyworld.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    apart,
    belongs,
    random_scene,
    seeded,
)

GROUP = 8
"""A scene and its neighbours, each of which differs from it in one attribute or two."""
_TWO_THINGS_SHARE = 0.5
_NEIGHBOUR_TRIES = 100
_MARGIN = 2
"""Pixels around a thing."""
_CLEANED_SHARE = 0.5
"""Captions in the form that CC3M's reader gives them."""
_CHANGES = ("shape", "position") * 3 + ("colour", "size", "background")
"""What tells a neighbour; shape and position, the hardest to see, more often."""
_VALUES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "position": POSITIONS, "background": BACKGROUNDS}


@dataclass(frozen=True)
class Pool:
    """Rendered training scenes; :data:`GROUP` consecutive ones are look-alikes."""

    scenes: Sequence[Scene]
    pixels_N3SS: Tensor
    """uint8."""

    def __len__(self) -> int:
        return len(self.scenes)

    def masks(self, numbers: Sequence[int]) -> Tensor:
        """Return 1 where a picture has a thing or its margin for jitter and blur, else 0: ``[B, 1, S, S]``."""
        covered = [
            np.max([thing_mask(thing) for thing in self.scenes[number].things], axis=0) for number in numbers
        ]
        masks_B1SS = torch.from_numpy(np.stack(covered))[:, None].gt(0).float()
        return F.max_pool2d(masks_B1SS, 2 * _MARGIN + 1, stride=1, padding=_MARGIN)

    def draw(self, generator: torch.Generator, count: int) -> list[int]:
        """Draw picture numbers uniformly."""
        return torch.randint(len(self), (count,), generator=generator).tolist()

    def draw_groups(self, generator: torch.Generator, count: int) -> list[int]:
        """Draw ``count`` picture numbers in whole groups."""
        groups = torch.randperm(len(self) // GROUP, generator=generator)[: count // GROUP]
        return [number for group in groups.tolist() for number in range(group * GROUP, (group + 1) * GROUP)]

    def captions(self, numbers: Sequence[int], generator: torch.Generator) -> list[str]:
        """Describe pictures in freshly drawn words."""
        rng = python_random(generator)
        texts = [caption(self.scenes[number], rng) for number in numbers]
        return [clean_caption(text) if rng.random() < _CLEANED_SHARE else text for text in texts]

    def pixels(self, numbers: Sequence[int]) -> Tensor:
        """Return pictures ``[B, 3, S, S]`` in [0, 1]."""
        return self.pixels_N3SS[list(numbers)].float() / 255


def make_pool(count: int, seed: int) -> Pool:
    """Render at least ``count`` training pictures: the same ones for the same seed."""
    groups = -(-count // GROUP)
    scenes: list[Scene] = []
    for index in range(groups):
        rng = seeded(seed, "train", "pool", index)
        first = random_scene(rng, "train", things=2 if rng.random() < _TWO_THINGS_SHARE else 1)
        scenes += [first, *(neighbour(first, rng) for _ in range(GROUP - 1))]
    drawer = seeded(seed, "train", "pool jitter")
    pictures = np.stack([np.asarray(render(scene, drawer)) for scene in scenes])
    return Pool(scenes, torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous())


def neighbour(scene: Scene, rng: Random) -> Scene:
    """Return a training scene that differs in one attribute or two, or has one swapped between its two things."""
    swap = len(scene.things) == 2 and rng.random() < 0.5
    changes = rng.choice((1, 2))
    for _ in range(_NEIGHBOUR_TRIES):
        other = _swapped(scene, rng) if swap else scene
        for _ in range(0 if swap else changes):
            other = _changed(other, rng)
        if other != scene and belongs(other, "train") and _is_drawable(other):
            return other
    return random_scene(rng, "train", things=len(scene.things))


def python_random(generator: torch.Generator) -> Random:
    """Return a Python random source seeded by a draw of a torch one."""
    return Random(int(torch.randint(2**62, (), generator=generator)))


def _changed(scene: Scene, rng: Random) -> Scene:
    name = rng.choice(_CHANGES)
    value = rng.choice(_VALUES[name])
    if name == "background":
        return Scene(scene.things, value)
    things = list(scene.things)
    place = rng.randrange(len(things))
    things[place] = _with(things[place], name, value)
    return Scene(tuple(things), scene.background)


def _swapped(scene: Scene, rng: Random) -> Scene:
    name = rng.choice(("shape", "colour", "size", "position"))
    first, second = scene.things
    swapped = _with(first, name, getattr(second, name)), _with(second, name, getattr(first, name))
    return Scene(swapped, scene.background)


def _with(thing: Thing, name: str, value: str) -> Thing:
    return replace(thing, **{name: value})


def _is_drawable(scene: Scene) -> bool:
    if len(scene.things) == 1:
        return True
    first, second = scene.things
    return first.shape != second.shape and first.colour != second.colour and apart(first.position, second.position)
