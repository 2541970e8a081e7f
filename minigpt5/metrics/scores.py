"""What a suite returns: scores with their counts, coverage, and values per prediction."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from minigpt5.metrics.text import clean_text
from minigpt5.predictions import Prediction

SampleValues = dict[str, float | None]
"""Score name → value of one prediction; None where it is not defined for it."""


@dataclass(frozen=True)
class Score:
    """One figure and what it is over."""

    value: float | None
    """None if nothing was there to score; never a stand-in number."""
    count: int
    """Predictions (or pictures, stories, conversations: see ``unit``) the value is over."""
    total: int
    """How many there are; the difference could not be scored."""
    unit: str = "predictions"


@dataclass(frozen=True)
class Coverage:
    """What was wanted and what was made, over all predictions."""

    predictions: int
    wanted_images: int
    """Predictions whose wanted response holds a picture."""
    made_images: int
    """Predictions whose reply holds a picture."""
    missing_images: int
    """A picture wanted, none made."""
    extra_images: int
    """A picture made, none wanted."""
    wanted_texts: int
    made_texts: int
    missing_texts: int
    extra_texts: int
    baseline_images: int

    @property
    def concerns_images(self) -> int:
        """Predictions with a picture wanted or made."""
        return self.wanted_images + self.extra_images

    @property
    def image_missing_rate(self) -> float | None:
        """Share of predictions that want a picture and have none."""
        return self.missing_images / self.wanted_images if self.wanted_images else None

    @property
    def text_missing_rate(self) -> float | None:
        """Share of predictions that want text and have none."""
        return self.missing_texts / self.wanted_texts if self.wanted_texts else None


@dataclass(frozen=True)
class Scores:
    """The outcome of one suite."""

    dataset: str
    scores: dict[str, Score]
    published: dict[str, float | None]
    """The figures of the published evaluation under its names (``results_dict.json``)."""
    coverage: Coverage
    networks: dict[str, str]
    """What computed the features, e.g. ``clip`` → ``open_clip ViT-L-14-quickgelu (openai)``."""
    samples: list[SampleValues]
    """Values of each prediction, in the predictions' order."""
    notes: list[str] = field(default_factory=list)


def mean_score(values: Iterable[float | None], unit: str = "predictions", total: int | None = None) -> Score:
    """Return the mean of the values that are there; ``total`` counts those that should be (None: all)."""
    everything = list(values)
    present = [value for value in everything if value is not None]
    total = len(everything) if total is None else total
    return Score(fmean(present) if present else None, len(present), total, unit)


def column(samples: Sequence[SampleValues], name: str) -> list[float | None]:
    """Return one score of every prediction."""
    return [sample.get(name) for sample in samples]


def measure_coverage(predictions: Sequence[Prediction], *, wants_text: bool = True) -> Coverage:
    """Count what was wanted and made; without ``wants_text`` the target is a caption, not a text to write."""
    wanted_image = [prediction.wants_image for prediction in predictions]
    made_image = [bool(prediction.images) for prediction in predictions]
    wanted_text = [wants_text and bool(clean_text(prediction.target)) for prediction in predictions]
    made_text = [bool(clean_text(prediction.text)) for prediction in predictions]
    return Coverage(
        predictions=len(predictions),
        wanted_images=sum(wanted_image),
        made_images=sum(made_image),
        missing_images=_count(wanted_image, made_image),
        extra_images=_count(made_image, wanted_image),
        wanted_texts=sum(wanted_text),
        made_texts=sum(made_text),
        missing_texts=_count(wanted_text, made_text),
        extra_texts=_count(made_text, wanted_text),
        baseline_images=sum(prediction.baseline_image is not None for prediction in predictions),
    )


def _count(present: list[bool], absent: list[bool]) -> int:
    return sum(one and not other for one, other in zip(present, absent, strict=True))
