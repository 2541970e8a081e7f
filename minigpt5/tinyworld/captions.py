"""The tiny world's words: how things and backgrounds are named, in lower-case ASCII, and how to read them back."""

import re
from dataclasses import replace
from random import Random

from minigpt5.tinyworld.scenes import COLOURS, MOST_THINGS, POSITIONS, Scene, Thing, grid_cell

Words = dict[str, tuple[str, ...]]

SIZE_WORDS: Words = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
SHAPE_WORDS: Words = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring",),
    "cross": ("cross",),
    "diamond": ("diamond",),
    "heart": ("heart",),
}
POSITION_PHRASES: Words = {
    "upper left": ("in the upper left", "in the top left corner"),
    "top": ("at the top",),
    "upper right": ("in the upper right", "in the top right corner"),
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the center"),
    "right": ("on the right", "on the right side"),
    "lower left": ("in the lower left", "in the bottom left corner"),
    "bottom": ("at the bottom",),
    "lower right": ("in the lower right", "in the bottom right corner"),
}
BACKGROUND_PHRASES: Words = {
    "sky": ("in the day sky", "in the daylight"),
    "night": ("in the night sky", "at night"),
    "grass": ("on the grass", "on the meadow"),
    "sand": ("on the sand", "on the beach"),
    "snow": ("on the snow", "in the snow"),
}
_ROWS, _COLUMNS = ("upper", "middle", "lower"), ("left", "center", "right")
_NOTHING = ". . . . ."
SEEN_WORDS = 1 + MOST_THINGS * len(_NOTHING.split())
"""The background, and each thing's size, colour, shape, row and column: see :func:`seen_words`."""
_ONE_THING = (
    "{thing} {place} {ground} .",
    "{thing} {ground} , {place} .",
    "there is {thing} {place} {ground} .",
    "a picture of {thing} {place} {ground} .",
    "{ground} there is {thing} {place} .",
    "{place} we see {thing} {ground} .",
)
_TWO_THINGS = (
    "{thing} {place} and {other} {other_place} {ground} .",
    "there is {thing} {place} and {other} {other_place} {ground} .",
    "{ground} there is {thing} {place} with {other} {other_place} .",
)
_BETWEEN_THINGS = re.compile(r"\b(?:and|with)\b")


def caption(scene: Scene, rng: Random) -> str:
    """Describe a scene with every attribute of every thing and the background."""
    words = {
        "thing": noun_phrase(scene.main, rng),
        "place": rng.choice(POSITION_PHRASES[scene.main.position]),
        "ground": rng.choice(BACKGROUND_PHRASES[scene.background]),
    }
    if len(scene.things) == 1:
        return rng.choice(_ONE_THING).format(**words)
    other = scene.things[1]
    words["other"] = noun_phrase(other, rng)
    words["other_place"] = rng.choice(POSITION_PHRASES[other.position])
    return rng.choice(_TWO_THINGS).format(**words)


def noun_phrase(thing: Thing, rng: Random) -> str:
    """Return for example "a small red star"."""
    words = [rng.choice(SIZE_WORDS[thing.size]), thing.colour, rng.choice(SHAPE_WORDS[thing.shape])]
    return article(" ".join(words))


def article(words: str) -> str:
    """Put "a" or "an" before a phrase."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plain_words(scene: Scene) -> str:
    """Return a scene's attributes in a fixed order and without synonyms: "night big red star upper left"."""
    return " ".join((scene.background, *(_plain_thing(thing) for thing in scene.things)))


def seen_words(scene: Scene) -> str:
    """Return what a picture alone tells: plain words, things in reading order, dots for a second one that is not.

    Always :data:`SEEN_WORDS` words.
    """
    return padded_words(in_reading_order(scene))


def padded_words(scene: Scene) -> str:
    """Return a scene's plain words, the main thing first, and dots for a second one that is not.

    Always :data:`SEEN_WORDS` words.
    """
    return " ".join([plain_words(scene)] + [_NOTHING] * (MOST_THINGS - len(scene.things)))


def in_reading_order(scene: Scene) -> Scene:
    """Return the scene with its things from top left to bottom right; a picture shows no other order."""
    return replace(scene, things=tuple(sorted(scene.things, key=lambda thing: POSITIONS.index(thing.position))))


def _plain_thing(thing: Thing) -> str:
    row, column = grid_cell(thing.position)
    return f"{thing.size} {thing.colour} {thing.shape} {_ROWS[row]} {_COLUMNS[column]}"


def read_attributes(text: str) -> dict[str, str]:
    """Return attribute → value for the attributes a text names, the first mention of each."""
    padded = f" {' '.join(re.findall('[a-z]+', text.lower()))} "
    found = {}
    for attribute, names in _NAMES.items():
        places = {
            value: padded.find(f" {words} ")
            for value, choices in names.items()
            for words in choices[::-1]
            if f" {words} " in padded
        }
        if places:
            found[attribute] = min(places, key=places.__getitem__)
    return found


def split_things(text: str) -> list[str]:
    """Return the parts of a text that tell of one thing each."""
    return _BETWEEN_THINGS.split(text)


def read_things(text: str) -> list[dict[str, str]]:
    """Return what :func:`read_attributes` finds of each thing in a caption, with its background."""
    read = [read_attributes(part) for part in split_things(text)]
    ground = {name: value for found in read for name, value in found.items() if name == "background"}
    return [found | ground for found in read]


_NAMES: dict[str, Words] = {
    "size": SIZE_WORDS,
    "shape": SHAPE_WORDS,
    "colour": {colour: (colour,) for colour in COLOURS},
    "position": POSITION_PHRASES,
    "background": BACKGROUND_PHRASES,
}
