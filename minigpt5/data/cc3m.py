"""Conceptual Captions: a tab-separated file with ``caption`` and ``image_path`` columns."""

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from minigpt4.errors import InputError
from minigpt5 import prompts
from minigpt5.data.index import LineFile, ReadOptions, wanted_tasks
from minigpt5.data.types import Problem, Sample, Split, Task

COLUMNS = ("caption", "image_path")
TAB = b"\t"
INSTRUCTION_EVERY = 100
"""Every hundredth caption of the training split is also asked for by an instruction (published)."""


def clean_caption(caption: str) -> str:
    """Return the caption as published: lower case, without most punctuation, single spaces."""
    caption = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption)
    return caption.rstrip("\n").strip(" ")


@dataclass(frozen=True)
class Cc3mIndex:
    """Samples of a CC3M file, made on access."""

    lines: LineFile
    columns: tuple[int, int, int]
    """Positions of caption and image_path, and the number of columns."""
    options: ReadOptions
    rows: np.ndarray
    """``[samples, 3]``: line, row number, whether it is the instruction variant."""
    problems: list[Problem]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        line, row, is_instruction = (int(value) for value in self.rows[index])
        fields = _split_row(self.lines[line].decode(), self.columns[2])
        assert fields is not None  # only rows that split were indexed
        caption = clean_caption(fields[self.columns[0]])
        name, prompt, task = f"cc3m_{row}", caption, Task.CAPTION
        if is_instruction:
            name, task = f"{name}_instruction", Task.INSTRUCTION
            prompt = prompts.cc3m_instruction(self.options.choose(name, prompts.CC3M_GENERATION), caption)
        # The published test split wants the caption, which the scores compare pictures with.
        response = caption if self.options.split is Split.TEST else f"{self.options.voken_text} {prompts.STOP}"
        return Sample(
            id=name,
            task=task,
            prompt=prompt,
            response=response,
            output_images=(self.options.folder / fields[self.columns[1]],),
            caption=caption,
        )


def read_cc3m(path: Path, options: ReadOptions) -> Cc3mIndex:
    """Index a CC3M file.

    Every line is a row of its own: a stray quotation mark cannot swallow the rows below it, and captions such
    as ``NA`` or ``null`` are text. The test split wants captions and has no instruction samples unless asked
    for.

    Args:
        path: tab-separated file with a header line.
        options: ``tasks`` are of ``caption`` and ``instruction``.

    Raises:
        InputError: the file or a column is missing.
    """
    both = (Task.CAPTION, Task.INSTRUCTION)
    default = both[:1] if options.split is Split.TEST else both
    wanted = wanted_tasks(options.tasks, available=both, default=default)
    lines = LineFile(path, options.head_bytes)
    columns = _read_header(lines)
    problems: list[Problem] = []
    found = islice(_index_rows(lines, columns, wanted, problems), None if options.head_bytes is None else 1)
    rows = np.fromiter(found, dtype=np.dtype((np.int64, 3)))
    return Cc3mIndex(lines, columns, options, rows, problems)


def is_cc3m_header(line: bytes) -> bool:
    """Whether a first line has both columns."""
    names = line.split(b"\t")
    return all(column.encode() in names for column in COLUMNS)


def _read_header(lines: LineFile) -> tuple[int, int, int]:
    names = lines[0].decode(errors="replace").split("\t") if len(lines) else []
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise InputError(
            f"{lines.path}:1: no column {' and '.join(missing)}; the first line names tab-separated columns, "
            f"found {names}"
        )
    return names.index(COLUMNS[0]), names.index(COLUMNS[1]), len(names)


def _index_rows(
    lines: LineFile, columns: tuple[int, int, int], wanted: frozenset[Task], problems: list[Problem]
) -> Iterator[tuple[int, int, int]]:
    row = -1
    for line in range(1, len(lines)):
        content = lines[line]
        if not content.strip(b" "):
            continue
        row += 1
        reason = _row_fault(content, columns)
        if reason is not None:
            problems.append(Problem(f"{lines.path}:{line + 1}", reason))
            continue
        if Task.CAPTION in wanted:
            yield line, row, 0
        if Task.INSTRUCTION in wanted and row % INSTRUCTION_EVERY == 0:
            yield line, row, 1


def _row_fault(content: bytes, columns: tuple[int, int, int]) -> str | None:
    try:
        fields = _split_row(content.decode(), columns[2])
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason} at byte {error.start})"
    if fields is None:
        return f"{columns[2]} tab-separated fields wanted, found {content.count(TAB) + 1}"
    return None if fields[columns[1]] else "no image_path"


def _split_row(text: str, count: int) -> list[str] | None:
    """Return the ``count`` fields of a row, quoted or not, or None if it has another number."""
    if '"' in text:
        with suppress(csv.Error):
            quoted = next(csv.reader([text], delimiter="\t"))
            if len(quoted) == count:
                return quoted
    plain = text.split("\t")
    return plain if len(plain) == count else None
