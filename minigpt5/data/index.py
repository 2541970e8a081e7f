"""What the readers share: a lean line file, a selection of samples, and the check that a sample is well-formed."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from minigpt4.errors import InputError
from minigpt5.data.types import INPUT_PICTURE, Problem, Sample, SampleIndex, Split, Task
from minigpt5.prompts import Choose

VOKEN = re.compile(r"\[IMG\d+\]")


def unicode_fault(text: str) -> str | None:
    """Return why a text cannot be tokenized, or None: JSON may hold half of a letter that takes two escapes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the text is not valid Unicode ({error.object[error.start : error.end]!a})"
    return None


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a reader needs besides its file; a reader uses what its layout calls for."""

    split: Split
    folder: Path
    """CC3M's and VIST's pictures are relative to it."""
    voken_text: str
    """One run of vokens as it stands in a response."""
    choose: Choose
    """Picks one prompt template of a group for a sample id."""
    count_tokens: Callable[[str], int]
    """Length of a text in language-model tokens."""
    tasks: tuple[str, ...] | None = None
    """Task variants to keep; None keeps the published choice for the split."""
    context: str = "full"
    """What a story's prompt holds of the steps before (``data.context``)."""
    head_bytes: int | None = None
    """Read a file of lines no further than this and stop at its first sample; None indexes all of it."""


@dataclass(frozen=True)
class LineFile:
    """The lines of a text file as one block of bytes.

    One block instead of a list of strings keeps millions of lines small and lets data-loading processes share
    them: nothing in it is reference-counted.

    Args:
        path: the file.
        limit: bytes to read at most; a line cut off there is left out. None reads everything.

    Raises:
        InputError: the file is missing.
    """

    path: Path
    limit: int | None = None
    content: bytes = field(init=False, repr=False)
    starts: np.ndarray = field(init=False, repr=False)
    """Byte offset of each line, and one past the end."""

    def __post_init__(self) -> None:
        content = read_bytes(self.path, self.limit).removeprefix(b"\xef\xbb\xbf")
        breaks = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
        end = [] if content.endswith(b"\n") or not content else [len(content) + 1]
        object.__setattr__(self, "content", content)
        object.__setattr__(self, "starts", np.concatenate([[0], breaks, end]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, line: int) -> bytes:
        return self.content[self.starts[line] : self.starts[line + 1] - 1].removesuffix(b"\r")


@dataclass(frozen=True)
class SelectedSamples:
    """Some samples of an index, in the order of ``positions``."""

    base: SampleIndex
    positions: np.ndarray
    problems: list[Problem]
    renamed: dict[int, str] = field(default_factory=dict)
    """Position in ``base`` → id, for samples whose id an earlier one already has."""

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        position = int(self.positions[index])
        sample = self.base[position]
        return replace(sample, id=self.renamed[position]) if position in self.renamed else sample


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """Return a file's content; with a limit, its whole lines within that many bytes.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            if limit is None or path.stat().st_size <= limit:
                return file.read()
            head = file.read(limit)
            return head[: head.rfind(b"\n") + 1]
    except FileNotFoundError:
        raise InputError(f"{path}: no such data file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def find_fault(sample: Sample, voken_text: str) -> str | None:
    """Return why a sample cannot be used, or None.

    A text that itself holds ``<ImageHere>``, or a wanted text that holds vokens, no longer has one placeholder
    a picture; the model could not tell which is meant.
    """
    placeholders = sample.prompt.count(INPUT_PICTURE) + sample.response.count(INPUT_PICTURE)
    if placeholders != len(sample.input_images):
        return f"a text holds {INPUT_PICTURE} itself; only a picture may stand for it"
    if sample.task is Task.CAPTION and sample.response == sample.caption:
        return None
    runs = sample.response.count(voken_text)
    stray = len(VOKEN.findall(sample.response.replace(voken_text, "")))
    if runs != len(sample.output_images) or stray:
        return "the wanted text holds vokens itself; only a picture may stand for them"
    return None


def first_template(_sample_id: str, group: Iterable[str]) -> str:
    """Choose the first template: enough to check a sample, as a group's templates hold the same placeholders."""
    return next(iter(group))


def wanted_tasks(
    tasks: Iterable[str] | None, *, available: tuple[Task, ...], default: tuple[Task, ...]
) -> frozenset[Task]:
    """Resolve ``data.tasks`` for one reader.

    Raises:
        InputError: a task this data set does not have.
    """
    if tasks is None:
        return frozenset(default)
    names = {str(task) for task in available}
    unknown = sorted({str(task) for task in tasks} - names)
    if unknown:
        raise InputError(
            f"data.tasks: no task {', '.join(unknown)} here; this data set has {', '.join(sorted(names))}"
        )
    return frozenset(Task(task) for task in tasks)
