"""What can happen to a scene: one attribute changes, another thing comes or goes; the rest stays as it is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from minigpt5.tinyworld.captions import (
    BACKGROUND_PHRASES,
    POSITION_PHRASES,
    SIZE_WORDS,
    noun_phrase,
    read_attributes,
    split_things,
)
from minigpt5.tinyworld.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SIZES,
    Scene,
    Thing,
    apart,
    belongs,
    random_second,
)

_LEAVES = ("goes away", "leaves")
_MEANS = {
    "grows": ("size", "big"),
    "shrinks": ("size", "small"),
    "night falls": ("background", "night"),
    "it gets dark": ("background", "night"),
    "it is night": ("background", "night"),
    "a new day comes": ("background", "sky"),
    "into the day sky": ("background", "sky"),
}
"""What a sentence says without naming the value."""
EVENT_KINDS = ("move", "resize", "recolour", "background", "meet", "leave")


@dataclass(frozen=True)
class Event:
    """A change of one kind, and the scene after it."""

    kind: str
    after: Scene


def possible_events(scene: Scene, split: str, rng: Random) -> dict[str, list[Event]]:
    """Return kind → the events that lead to another scene of ``split``; kinds without any are left out."""
    main, kinds = scene.main, {}
    kinds["move"] = [scene.with_main(position=value) for value in POSITIONS if value != main.position]
    kinds["resize"] = [scene.with_main(size=value) for value in SIZES if value != main.size]
    kinds["recolour"] = [scene.with_main(colour=value) for value in COLOURS if value != main.colour]
    kinds["background"] = [replace(scene, background=value) for value in BACKGROUNDS if value != scene.background]
    if len(scene.things) == 1:
        met = random_second(rng, scene, split)
        kinds["meet"] = [met] if met else []
    else:
        kinds["leave"] = [replace(scene, things=(main,))]
    events = {
        kind: [Event(kind, after) for after in scenes if belongs(after, split) and _is_drawable(after)]
        for kind, scenes in kinds.items()
    }
    return {kind: choices for kind, choices in events.items() if choices}


def random_event(scene: Scene, split: str, rng: Random, exclude: tuple[str, ...] = ()) -> Event | None:
    """Draw a kind, then an event of it; None if nothing outside ``exclude`` can happen within ``split``."""
    events = possible_events(scene, split, rng)
    kinds = [kind for kind in EVENT_KINDS if kind in events and kind not in exclude]
    return rng.choice(events[rng.choice(kinds)]) if kinds else None


def describe_event(before: Scene, event: Event, rng: Random) -> str:
    """Return the sentence that tells what happens to a scene; what stays as it was is not mentioned."""
    main = event.after.main
    if event.kind == "move":
        return rng.choice(
            (
                f"it moves to the {main.position} .",
                f"then it goes to the {main.position} .",
                f"it jumps to the {main.position} .",
            )
        )
    if event.kind == "resize":
        verb = "grows" if main.size == "big" else "shrinks"
        size = rng.choice(SIZE_WORDS[main.size])
        return rng.choice((f"it {verb} .", f"it becomes {size} .", f"now it is {size} ."))
    if event.kind == "recolour":
        colour = main.colour
        return rng.choice((f"it turns {colour} .", f"it becomes {colour} .", f"now it is {colour} ."))
    if event.kind == "meet":
        other = event.after.things[1]
        thing, place = noun_phrase(other, rng), rng.choice(POSITION_PHRASES[other.position])
        sentences = (f"it meets {thing} {place} .", f"{thing} comes {place} .", f"then we see {thing} {place} .")
        return rng.choice(sentences)
    if event.kind == "leave":
        other = before.things[1]
        return rng.choice(("the {} {} goes away .", "the {} {} leaves .")).format(other.colour, other.shape)
    return _describe_background(event.after.background, rng)


def _describe_background(background: str, rng: Random) -> str:
    if background == "night":
        return rng.choice(("night falls .", "it gets dark .", "now it is night ."))
    if background == "sky":
        sentences = ("a new day comes .", "it flies into the day sky .", "now it is in the daylight .")
        return rng.choice(sentences)
    ground = rng.choice(BACKGROUND_PHRASES[background])
    return rng.choice((f"then it lands {ground} .", f"now it is {ground} .", f"next it is {ground} ."))


def fits(text: str, scene: Scene, before: Scene | None = None) -> bool:
    """Whether a story's sentence can stand under a picture of ``scene``.

    What it names of a thing must be true of one thing, if it tells of two then of one each, and what it names of
    the background of that. A thing that leaves must be gone, and must have been there ``before``. A sentence that
    names nothing does not fit.
    """
    things, backgrounds = _said(text)
    if backgrounds - {scene.background}:
        return False
    is_there = [_any_is(scene.things, said) for said in things]
    if _tells_that_something_leaves(text):
        was_there = [before is not None and _any_is(before.things, said) for said in things]
        return bool(things) and not any(is_there) and all(was_there)
    return all(is_there) and bool(things or backgrounds)


def tells_news(text: str, scene: Scene, before: Scene) -> bool:
    """Whether a story's sentence fits a picture of ``scene`` and tells something that was not so ``before``.

    That is a new background, a thing that leaves, or a new or changed thing of which the sentence was not true.
    """
    if not fits(text, scene, before):
        return False
    things, backgrounds = _said(text)
    new = [thing for thing in scene.things if thing not in before.things]
    gone = [thing for thing in before.things if thing not in scene.things]
    return (
        _tells_that_something_leaves(text)
        or bool(backgrounds - {before.background})
        or any(_any_is(new, said) and not _any_is(gone, said) for said in things)
    )


def _said(text: str) -> tuple[list[dict[str, str]], set[str]]:
    """Return what a sentence says of each thing that it tells of, attribute → value, and of the background."""
    things, backgrounds = [], set()
    for part in split_things(text.lower()):
        said = read_attributes(part)
        said |= dict(value for words, value in _MEANS.items() if words in part)
        if moved := re.search(rf"\bto the ({'|'.join(sorted(POSITIONS, key=len, reverse=True))})\b", part):
            said["position"] = moved[1]
        if background := said.pop("background", None):
            backgrounds.add(background)
        if said:
            things.append(said)
    return things, backgrounds


def _any_is(things: Sequence[Thing], said: Mapping[str, str]) -> bool:
    return any(all(getattr(thing, name) == value for name, value in said.items()) for thing in things)


def _tells_that_something_leaves(text: str) -> bool:
    return any(words in text.lower() for words in _LEAVES)


def _is_drawable(scene: Scene) -> bool:
    return len(scene.things) == 1 or apart(scene.things[0].position, scene.things[1].position)
