"""How much of what was wanted the replies over tiny-world data show and say: shares, by the recogniser.

Wanted pictures are renders, on which the recogniser is exact; so a folder of predictions needs nothing beside it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from minigpt4.errors import InputError
from minigpt5.data.types import Task
from minigpt5.predictions import Prediction, read_predictions
from minigpt5.tinyworld.events import fits, tells_news
from minigpt5.tinyworld.recogniser import Agreement, compare, recognise, shows_things
from minigpt5.tinyworld.scenes import MOST_THINGS, Scene

_STEP = re.compile(r"(.+)_(\d+)-\w+")
"""The id of a story's task: which story, and which step of it."""
FLOORS: dict[str, dict[str, float]] = {
    "cc3m": {"shape_and_colour": 0.90},
    "vist": {"all_attributes": 0.75, "text_consistent": 0.85},
    "mmdialog": {"modality": 0.95, "all_attributes": 0.80},
}
"""Data set → share → the least that both stages must reach on held-out data."""
MEANINGS = {
    "shape_and_colour": "wanted thing: shape and colour",
    "all_attributes": "wanted thing: all five attributes",
    "whole_picture": "wanted picture: all of it and nothing else",
    "size": "wanted thing: size",
    "position": "wanted thing: position",
    "background": "wanted thing: background",
    "both_things": "wanted picture of two things: both, background aside",
    "text_consistent": "sentence agrees with its picture",
    "text_news": "sentence tells what is new in its picture",
    "modality": "picture where one was wanted, none where none was",
}


@dataclass(frozen=True)
class Share:
    """How many of ``total`` predictions are right, and the least share they must be, if there is one."""

    name: str
    right: int
    total: int
    floor: float | None = None

    @property
    def value(self) -> float:
        """Return the share of right predictions; no number if there was nothing to measure."""
        return self.right / self.total if self.total else math.nan

    @property
    def met(self) -> bool:
        """Whether the floor is reached, or there is none."""
        return self.floor is None or self.value >= self.floor

    def __str__(self) -> str:
        verdict = "" if self.floor is None else f"   floor {self.floor:4.0%}   {'met' if self.met else 'NOT MET'}"
        if not self.total:
            return f"{MEANINGS[self.name]:52} nothing to measure it on   floor {self.floor:4.0%}"
        return f"{MEANINGS[self.name]:52} {self.value:7.1%}   {self.right:4} of {self.total:4}{verdict}"


def score_folder(folder: Path) -> list[Share]:
    """Measure the predictions of a folder.

    Each thing of a wanted picture counts, with the picture's background as its fifth attribute. A picture that was
    not made is wrong in everything; of several only the first counts. What a picture shows is measured where what
    came before decides it (:func:`is_determined`).

    Args:
        folder: a prediction store over tiny-world data.

    Raises:
        InputError: no predictions, or of more than one data set.
    """
    predictions = read_predictions(folder)
    datasets = sorted({prediction.dataset for prediction in predictions})
    if len(datasets) != 1:
        held = ", ".join(datasets) or "no predictions"
        raise InputError(f"{folder}: holds {held}; predictions of one data set wanted")
    floors = FLOORS.get(datasets[0], {})
    pictures = _Pictures(folder)
    things = [thing for one in predictions if is_determined(one) for thing in _agreements(pictures, one)]
    found: dict[str, Sequence[bool]] = {
        "shape_and_colour": [one is not None and one.shape and one.colour for one in things],
        "all_attributes": [one is not None and one.all for one in things],
    }
    for name in ("size", "position", "background"):
        found[name] = [one is not None and getattr(one, name) for one in things]
    found |= _whole_pictures(pictures, predictions)
    found |= _sentences(pictures, predictions)
    found["modality"] = [bool(one.images) == one.wants_image for one in predictions]
    return [
        Share(name, sum(found[name]), len(found[name]), floors.get(name))
        for name in MEANINGS
        if found[name] or name in floors
    ]


def is_determined(prediction: Prediction) -> bool:
    """Whether a picture is wanted, and all that came before it decides what it shows.

    Nobody can know a story's next event before it is told, nor how a story begins that says "look at this .". It
    is the story that counts, not how much of it the prompt holds (``data.context``).
    """
    if prediction.dataset != "vist":
        return prediction.wants_image
    return prediction.task == Task.GENERATION and _story_step(prediction)[1] > 0


def _story_step(prediction: Prediction) -> tuple[str, int]:
    """Return story and step of a story's task; step 0 where the id does not say."""
    step = _STEP.fullmatch(prediction.id)
    return (step[1], int(step[2])) if step else (prediction.id, 0)


class _Pictures:
    """What a folder's pictures show, kept once it is recognised."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._scenes: dict[tuple[str, int], Scene] = {}

    def scene(self, name: str, most_things: int = MOST_THINGS) -> Scene:
        """Return what a picture shows, of at most so many things."""
        key = name, most_things
        if key not in self._scenes:
            self._scenes[key] = recognise(self._open(name), most_things)
        return self._scenes[key]

    def _open(self, name: str) -> Image.Image:
        path = self._folder / name
        try:
            return Image.open(path).convert("RGB")
        except OSError as error:
            raise InputError(f"{path}: cannot be read as a picture ({error}); predict again") from None


def _agreements(pictures: _Pictures, prediction: Prediction) -> list[Agreement | None]:
    """Compare each thing of the wanted picture with the picture that was made, if any was."""
    wanted = pictures.scene(prediction.target_images[0])
    if not prediction.images:
        return [None] * len(wanted.things)
    made = pictures.scene(prediction.images[0])
    return [compare(replace(wanted, things=(thing,)), made) for thing in wanted.things]


def _whole_pictures(pictures: _Pictures, predictions: Sequence[Prediction]) -> dict[str, list[bool]]:
    """Return of each wanted picture whether it was made whole, and of those of two things whether both are there.

    A thing too many is wrong in both, another background in the first alone.
    """
    whole, both = [], []
    for prediction in filter(is_determined, predictions):
        wanted = pictures.scene(prediction.target_images[0])
        made = pictures.scene(prediction.images[0], MOST_THINGS + 1) if prediction.images else None
        has_things = made is not None and shows_things(wanted, made)
        whole.append(has_things and made is not None and made.background == wanted.background)
        if len(wanted.things) == MOST_THINGS:
            both.append(has_things)
    return {"whole_picture": whole, "both_things": both}


def _sentences(pictures: _Pictures, predictions: Sequence[Prediction]) -> dict[str, list[bool]]:
    """Return of each of a story's sentences whether it agrees with its picture, and whether it tells what is new.

    The picture is the shown one or the one made along with it. The one before is the story's, whether the prompt
    holds it (``data.context``) or not.
    """
    stories = [one for one in predictions if one.dataset == "vist"]
    told = {_story_step(one): one.target_images[0] for one in stories if one.wants_image}
    agrees, news = [], []
    for prediction in stories:
        told_picture = _told_picture(prediction)
        if told_picture is None:
            continue
        name, shown = told_picture
        story, step = _story_step(prediction)
        earlier = told.get((story, step - 1), shown[-1] if shown else None)
        scene = pictures.scene(name)
        before = pictures.scene(earlier) if earlier else None
        agrees.append(fits(prediction.text, scene, before))
        if before is not None:
            news.append(tells_news(prediction.text, scene, before))
    return {"text_consistent": agrees, "text_news": news}


def _told_picture(prediction: Prediction) -> tuple[str, tuple[str, ...]] | None:
    """Return the picture that a story's sentence goes with, and those shown before it; None if there is none."""
    shown = prediction.input_images
    if prediction.task == Task.UNDERSTANDING and shown:
        return shown[-1], shown[:-1]
    if prediction.task == Task.MULTIMODAL and prediction.images:
        return prediction.images[0], shown
    return None
