"""One row a compared value, and the two ways to compare."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """What one golden value's comparison came to."""

    group: str
    name: str
    max_abs: float
    max_rel: float
    """Largest absolute difference over the largest absolute reference value."""
    tolerance: float
    equal: bool
    note: str = ""
    compared: bool = True
    """False for a recorded value that nothing is compared with; the note says why."""


def not_compared(group: str, name: str, why: str) -> Row:
    """Return the row of a recorded value that has nothing to be compared with."""
    return Row(group, name, 0.0, 0.0, 0.0, True, why, compared=False)


class Recorded(dict[str, Tensor]):
    """Recorded tensors that remember which of them were looked at."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.used.add(key)
        return super().__getitem__(key)

    def unused(self) -> list[str]:
        """Return the names nobody asked for."""
        return [key for key in self if key not in self.used]


def compare_tensor(group: str, name: str, ours: Any, reference: Any, tolerance: float) -> Row:
    """Compare numbers relative to the largest |reference|; a wrong shape or a NaN is a difference."""
    ours = torch.as_tensor(ours).detach().double()
    reference = torch.as_tensor(reference).detach().double()
    if ours.shape != reference.shape:
        note = f"shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
        return Row(group, name, float("inf"), float("inf"), tolerance, False, note)
    if reference.numel() == 0:
        return Row(group, name, 0.0, 0.0, tolerance, True, "empty")
    max_abs = float((ours - reference).abs().max())
    scale = float(reference.abs().max())
    max_rel = max_abs / scale if scale else max_abs
    return Row(group, name, max_abs, max_rel, tolerance, max_rel <= tolerance)


def compare_exact(group: str, name: str, ours: Any, reference: Any) -> Row:
    """Compare values that must be identical: ids, strings, lists, integer tensors."""
    if isinstance(ours, Tensor) or isinstance(reference, Tensor):
        ours, reference = torch.as_tensor(ours), torch.as_tensor(reference)
        equal = ours.shape == reference.shape and bool((ours.long() == reference.long()).all())
    else:
        equal = ours == reference
    note = "" if equal else f"{str(ours)[:60]!r}, expected {str(reference)[:60]!r}"
    return Row(group, name, 0.0 if equal else float("inf"), 0.0 if equal else float("inf"), 0.0, equal, note)
