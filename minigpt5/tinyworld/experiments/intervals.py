"""A mean over seeds and how sure it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with half the width of its 95 % interval; None where one value tells nothing of the spread."""

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        """Return both in per cent."""
        spread = "" if self.half is None else f" ± {100 * self.half:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean and its interval by Student's t: t · s / √n with n - 1 degrees of freedom.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean of no values")
    if len(values) == 1:
        return Interval(values[0], None, 1)
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(fmean(values), quantile * stdev(values) / math.sqrt(len(values)), len(values))
