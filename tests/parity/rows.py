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
