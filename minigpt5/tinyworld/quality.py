"""How much of what was wanted the replies over tiny-world data show and say: shares, by the recogniser.

Wanted pictures are renders, on which the recogniser is exact; so a folder of predictions needs nothing beside it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from minigpt4.errors import InputError
from minigpt5.data.types import Task
from minigpt5.predictions import Prediction, read_predictions
from minigpt5.tinyworld.events import fits
from minigpt5.tinyworld.recogniser import Agreement, compare, recognise

_STEP = re.compile(r"_(\d+)-gen$")
"""In the id of a story's task: which picture of it is wanted."""
FLOORS: dict[str, dict[str, float]] = {
    "cc3m": {"shape_and_colour": 0.90},
    "vist": {"all_attributes": 0.75, "text_consistent": 0.85},
    "mmdialog": {"modality": 0.95, "all_attributes": 0.80},
}
"""Data set → share → the least that both stages must reach on held-out data."""
MEANINGS = {
    "shape_and_colour": "wanted thing: shape and colour",
    "all_attributes": "wanted thing: all five attributes",
    "size": "wanted thing: size",
    "position": "wanted thing: position",
    "background": "wanted thing: background",
    "both_things": "wanted picture of two things: both, background aside",
    "text_consistent": "sentence agrees with its picture",
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
        """Return the share of right predictions."""
        return self.right / self.total

    @property
    def met(self) -> bool:
        """Whether the floor is reached, or there is none."""
        return self.floor is None or self.value >= self.floor

    def __str__(self) -> str:
        verdict = "" if self.floor is None else f"   floor {self.floor:4.0%}   {'met' if self.met else 'NOT MET'}"
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
    things = [thing for one in predictions if is_determined(one) for thing in _agreements(folder, one)]
    found: dict[str, Sequence[bool]] = {
        "shape_and_colour": [one is not None and one.shape and one.colour for one in things],
        "all_attributes": [one is not None and one.all for one in things],
    }
    for name in ("size", "position", "background"):
        found[name] = [one is not None and getattr(one, name) for one in things]
    found["both_things"] = _both_things(folder, predictions)
    found["text_consistent"] = [
        fits(one.text, *map(recognise, pictures))
        for one in predictions
        if (pictures := _told_pictures(folder, one))
    ]
    found["modality"] = [bool(one.images) == one.wants_image for one in predictions]
    return [Share(name, sum(right), len(right), floors.get(name)) for name, right in found.items() if right]


def is_determined(prediction: Prediction) -> bool:
    """Whether a picture is wanted, and all that came before it decides what it shows.

    Nobody can know a story's next event before it is told, nor how a story begins that says "look at this .". It
    is the story that counts, not how much of it the prompt holds (``data.context``).
    """
    if prediction.dataset != "vist":
        return prediction.wants_image
    step = _STEP.search(prediction.id)
    return prediction.task == Task.GENERATION and step is not None and int(step[1]) > 0


def measure_folder(folder: Path) -> dict[str, float]:
    """Return name → share of the predictions of a folder: :func:`score_folder` without counts and floors."""
    return {share.name: share.value for share in score_folder(folder)}


def _agreements(folder: Path, prediction: Prediction) -> list[Agreement | None]:
    """Compare each thing of the wanted picture with the picture that was made, if any was."""
    wanted = recognise(_open(folder, prediction.target_images[0]))
    if not prediction.images:
        return [None] * len(wanted.things)
    made = _open(folder, prediction.images[0])
    return [compare(replace(wanted, things=(thing,)), made) for thing in wanted.things]


def _both_things(folder: Path, predictions: Sequence[Prediction]) -> list[bool]:
    right = []
    for prediction in predictions:
        if not is_determined(prediction):
            continue
        wanted = recognise(_open(folder, prediction.target_images[0]))
        if len(wanted.things) == 2:
            made = recognise(_open(folder, prediction.images[0])) if prediction.images else None
            right.append(made is not None and set(made.things) == set(wanted.things))
    return right


def _told_pictures(folder: Path, prediction: Prediction) -> list[Image.Image]:
    """Return the picture that a story's sentence goes with, shown or made along with it, and the one before it."""
    if prediction.dataset != "vist":
        return []
    shown = list(prediction.input_images)
    if prediction.task == Task.MULTIMODAL and prediction.images:
        shown.append(prediction.images[0])
    elif prediction.task != Task.UNDERSTANDING:
        return []
    return [_open(folder, name) for name in reversed(shown[-2:])]


def _open(folder: Path, name: str) -> Image.Image:
    path = folder / name
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a picture ({error}); predict again") from None
