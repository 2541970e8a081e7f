"""MMDialog: conversations of two users, one JSON object a line, turns with text and at times a picture."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minigpt5 import prompts
from minigpt5.data.index import LineFile, ReadOptions, find_fault, unicode_fault, wanted_tasks
from minigpt5.data.types import Problem, Sample, Split, Task

MAX_TRAINING_TOKENS = 50
"""A training conversation ends before a turn with more text tokens (published)."""
EXCLUDED_PICTURES = frozenset({"-3872362534310063124"})
"""Pictures the published reader ends a conversation at."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says, and the picture's file name if there is one."""

    text: str
    picture: str | None


@dataclass(frozen=True)
class MMDialogIndex:
    """Samples of an MMDialog file, made on access: every turn but the first is wanted from those before it."""

    lines: LineFile
    options: ReadOptions
    rows: np.ndarray
    """``[samples, 2]``: line and turn."""
    problems: list[Problem]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        line, position = (int(value) for value in self.rows[index])
        record = json.loads(self.lines[line])
        turns = [_parse_turn(turn) for turn in record["conversation"][: position + 1]]
        return make_sample(record["conversation_id"], turns, self.lines.path.parent, self.options.voken_text)


def window_start(position: int) -> int:
    """Return the first turn of the history that the turn at ``position`` is answered from.

    Published behaviour: from the fifth turn on, the oldest question and answer are dropped each time an answer
    was given, which leaves two or three turns.
    """
    return 0 if position < 4 else (position // 2 - 1) * 2


def make_sample(conversation_id: Any, turns: list[Turn], folder: Path, voken_text: str) -> Sample:
    """Return the sample whose wanted response is the last of ``turns``; pictures lie in ``folder``."""
    *history, wanted = turns
    position = len(history)
    history = history[window_start(position) :]
    vokens = f" {voken_text}" if wanted.picture else ""
    return Sample(
        id=f"{conversation_id}_{position}-mm",
        task=Task.DIALOGUE,
        prompt=prompts.dialogue_history([(turn.text, turn.picture is not None) for turn in history]),
        response=f"{wanted.text}{vokens} {prompts.STOP}",
        input_images=tuple(folder / turn.picture for turn in history if turn.picture),
        output_images=(folder / wanted.picture,) if wanted.picture else (),
    )


def read_mmdialog(path: Path, options: ReadOptions) -> MMDialogIndex:
    """Index an MMDialog file.

    A conversation ends before its first turn that cannot be used, as published: malformed, without text, with
    a file name for text, with a missing picture, or, outside the test split, too long. Of several pictures in
    a turn the first is taken.

    Args:
        path: one conversation a line; its pictures are ``<key>.jpg`` in the same folder.
        options: ``tasks`` is None or ``dialogue``; ``folder`` and ``choose`` are not used.

    Raises:
        InputError: the file is missing.
    """
    wanted_tasks(options.tasks, available=(Task.DIALOGUE,), default=(Task.DIALOGUE,))
    lines = LineFile(path, options.head_bytes)
    problems: list[Problem] = []
    found = islice(_index_conversations(lines, options, problems), None if options.head_bytes is None else 1)
    rows = np.fromiter(found, dtype=np.dtype((np.int64, 2)))
    return MMDialogIndex(lines, options, rows, problems)


def _is_too_long(text: str, options: ReadOptions) -> bool:
    # A token but the first is at least a byte long, so short texts need no tokenizing.
    if options.split is Split.TEST or len(text.encode()) < MAX_TRAINING_TOKENS:
        return False
    return options.count_tokens(text) > MAX_TRAINING_TOKENS


def _index_conversations(
    lines: LineFile, options: ReadOptions, problems: list[Problem]
) -> Iterator[tuple[int, int]]:
    for line in range(len(lines)):
        content = lines[line]
        if not content.strip():
            continue
        source = f"{lines.path}:{line + 1}"
        record = _parse_record(content)
        if isinstance(record, str):
            problems.append(Problem(source, record))
            continue
        turns: list[Turn] = []
        # A conversation of one turn has nothing to answer, so its turn is not looked at.
        for position, value in enumerate(record["conversation"] if len(record["conversation"]) > 1 else []):
            turn = _read_turn(value, lines.path.parent)
            if isinstance(turn, str):
                problems.append(Problem(source, f"turn {position}: {turn}; the conversation ends before it"))
                break
            if _is_too_long(turn.text, options):
                break
            turns.append(turn)
            if position == 0:
                continue
            sample = make_sample(record["conversation_id"], turns, lines.path.parent, options.voken_text)
            fault = find_fault(sample, options.voken_text)
            if fault is None:
                yield line, position
            else:
                problems.append(Problem(f"{source} {sample.id}", fault))


def _parse_record(content: bytes) -> dict[str, Any] | str:
    """Return the conversation of a line, or what is wrong with it."""
    try:
        record = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"not JSON ({error})"
    if not isinstance(record, dict):
        return f"a JSON object wanted, found {type(record).__name__}"
    missing = [key for key in ("conversation_id", "conversation") if key not in record]
    if missing:
        return f"no {' and '.join(missing)}"
    return record if isinstance(record["conversation"], list) else "the conversation is no list"


def _parse_turn(value: Any) -> Turn:
    parts = value["turn"]
    picture = None if len(parts) == 1 else f"{parts[1]['__MEDIA__']}.jpg"
    return Turn(parts[0]["__TEXT__"], picture)


def _read_turn(value: Any, folder: Path) -> Turn | str:
    """Return the turn, or why it cannot be used."""
    try:
        turn = _parse_turn(value)
    except (KeyError, IndexError, TypeError):
        return "a turn holds a text part, then at most pictures"
    if not isinstance(turn.text, str) or not turn.text:
        return "no text"
    if fault := unicode_fault(turn.text):
        return fault
    if turn.text.endswith(".jpg"):
        return "a file name instead of text"
    if turn.picture is None:
        return turn
    if turn.picture.removesuffix(".jpg") in EXCLUDED_PICTURES:
        return f"picture {turn.picture} is excluded, as published"
    return turn if (folder / turn.picture).is_file() else f"no picture {folder / turn.picture}"
