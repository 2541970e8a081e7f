"""MM-Relevance: how close a reply of text and pictures is to the wanted one (MMDialog, arXiv 2211.05719).

A reply is a sequence of elements, each a text or a picture, as unit vectors of CLIP's common space.
Shapes: E embedding width.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from minigpt5.metrics.text import FIRST_VOKEN, STOP, clean_text, strip_ends

_VOKEN_RUN = re.compile(r"\[IMG0\](?:\s*\[IMG[1-9]\d*\])*")


def soft_f1(similarities: Sequence[float], missing: int, extra: int) -> float:
    """Return the soft F1 of matched elements.

    precision = Σ similarity / (matched + extra), recall = Σ similarity / (matched + missing).

    Args:
        similarities: cosine similarity of each matched pair.
        missing: wanted elements without a partner.
        extra: generated elements without a partner.
    """
    if not similarities:
        return 0.0
    total = sum(similarities)
    precision = total / (len(similarities) + extra)
    recall = total / (len(similarities) + missing)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def mm_relevance(wanted: Sequence[Tensor], made: Sequence[Tensor]) -> float | None:
    """Return one response's MM-Relevance: elements are paired in order, whatever their modality.

    Args:
        wanted: unit vectors ``[E]`` of the wanted elements, in order.
        made: unit vectors ``[E]`` of the generated ones.

    Returns:
        The soft F1; None if nothing was wanted and nothing made.
    """
    if not wanted and not made:
        return None
    similarities = [float(first @ second) for first, second in zip(wanted, made, strict=False)]
    matched = len(similarities)
    return soft_f1(similarities, missing=len(wanted) - matched, extra=len(made) - matched)


def split_elements(text: str, images: Iterable[str]) -> list[tuple[str, str]]:
    """Return a response's elements in order: ``("text", words)`` and ``("image", path)``.

    Each run of vokens stands for the next picture. Vokens without a picture are dropped, pictures without vokens
    come last.
    """
    elements: list[tuple[str, str]] = []
    remaining = list(images)
    for index, part in enumerate(_VOKEN_RUN.sub(FIRST_VOKEN, text).split(FIRST_VOKEN)):
        if index and remaining:
            elements.append(("image", remaining.pop(0)))
        if words := clean_text(part):
            elements.append(("text", words))
    return elements + [("image", path) for path in remaining]


def show_vokens(text: str) -> str:
    """Return a response for reading: runs of vokens as ``[picture]``, without ``###``, ``<s>`` and ``</s>``."""
    return _VOKEN_RUN.sub("[picture]", strip_ends(text).replace(STOP, "")).strip()


def conversation_f1(turns: Iterable[Mapping[str, float | str]], kinds: Sequence[str]) -> float:
    """Return the published ``clip_f1`` of one conversation: one soft F1 over all its turns.

    Texts are compared with texts and pictures with pictures.

    Args:
        turns: per turn, kind of element → similarity, or ``"missing"`` or ``"extra"``.
        kinds: the kinds to take, in order.
    """
    values = [turn[kind] for kind in kinds for turn in turns if kind in turn]
    similarities = [value for value in values if not isinstance(value, str)]
    return soft_f1(similarities, missing=values.count("missing"), extra=values.count("extra"))
