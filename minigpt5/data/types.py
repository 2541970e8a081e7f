"""The objects that pass between reading, encoding, training, generation and scoring.

Shapes: B batch, T text tokens, P input pictures of the whole batch, O output pictures of the whole batch,
L queries a picture, H language width, C latent channels (mean and log-variance: 2 × 4).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image

INPUT_PICTURE = "<ImageHere>"
"""Placeholder of one input picture in a prompt."""


class Task(StrEnum):
    """The published task variants."""

    CAPTION = "caption"
    INSTRUCTION = "instruction"
    GENERATION = "generation"
    MULTIMODAL = "multimodal"
    UNDERSTANDING = "understanding"
    DIALOGUE = "dialogue"


class Split(StrEnum):
    """What the samples are for; readers and transforms differ by it."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True)
class Sample:
    """One prompt with its wanted response, pictures as paths.

    ``prompt`` holds one ``<ImageHere>`` per path of ``input_images``, in order. ``response`` holds one run of
    vokens per path of ``output_images``, in order (CC3M's test split, as published, holds the caption).
    """

    id: str
    task: Task
    prompt: str
    response: str
    input_images: tuple[Path, ...] = ()
    output_images: tuple[Path, ...] = ()
    caption: str | None = None
    """Trains the caption loss and gives the baseline picture."""
    description: str | None = None
    """What the wanted picture shows where neither caption nor response say it; used in scores alone."""


@dataclass(frozen=True)
class Problem:
    """A record that was left out, and why."""

    source: str
    """``file:line`` or ``file: key`` of the record."""
    reason: str


class SampleIndex(Protocol):
    """A data file, indexed: samples are made on access, problems were found while indexing."""

    @property
    def problems(self) -> list[Problem]:
        """Records that were left out."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class EncodedSample:
    """One sample as tensors, before batching. Text has no beginning-of-sequence token."""

    sample: Sample
    input_ids_T: torch.Tensor
    labels_T: torch.Tensor
    """-100 where no language loss is taken: the prompt and the inner vokens of each run."""
    input_pixels_P3HW: torch.Tensor | None
    output_pixels_O3HW: torch.Tensor | None
    """In [-1, 1] for training and validation, as the VAE expects."""
    input_features_PLH: torch.Tensor | None = None
    """Precomputed projections, instead of ``input_pixels``."""
    output_moments_OCHW: torch.Tensor | None = None
    """Precomputed VAE moments, instead of ``output_pixels``."""


@dataclass
class Batch:
    """Samples padded and concatenated. Text is padded on the right.

    Pictures of all samples are concatenated in sample order; the counts say how many belong to each.
    """

    samples: list[Sample]
    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    labels_BT: torch.Tensor
    input_counts: list[int]
    output_counts: list[int]
    input_pixels_P3HW: torch.Tensor | None = None
    output_pixels_O3HW: torch.Tensor | None = None
    input_features_PLH: torch.Tensor | None = None
    output_moments_OCHW: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def captions(self) -> list[str | None]:
        """The samples' captions, in order."""
        return [sample.caption for sample in self.samples]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on ``device``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        to_gpu = str(device).startswith("cuda")  # what comes back could be read before it is there
        moved = {
            name: value.to(device, non_blocking=to_gpu) if hasattr(value, "to") else value
            for name, value in values.items()
        }
        return Batch(**moved)

    def pin_memory(self) -> Batch:
        """Return the batch with its tensors in pinned memory (called by ``DataLoader``)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned = {
            name: value.pin_memory() if hasattr(value, "pin_memory") else value for name, value in values.items()
        }
        return Batch(**pinned)


@dataclass(frozen=True)
class Prompt:
    """What a reply is wanted for. ``text`` holds one ``<ImageHere>`` per picture of ``images``."""

    id: str
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A generated answer: text and pictures in the order they came."""

    id: str
    parts: tuple[str | Image.Image, ...]
    raw_text: str
    """The decoded tokens with ``[IMG0]`` where a picture stands and the stop string, as published."""
    token_ids: tuple[int, ...]
    """Generated tokens, starting with the beginning-of-sequence token; only ``[IMG0]`` of each voken run."""

    @property
    def text(self) -> str:
        """The text parts joined by one space."""
        return " ".join(part.strip() for part in self.parts if isinstance(part, str)).strip()

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The picture parts, in order."""
        return tuple(part for part in self.parts if not isinstance(part, str))
