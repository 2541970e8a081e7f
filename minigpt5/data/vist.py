"""Visual storytelling: stories of captioned pictures, with a mapping from picture id to file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt4.errors import InputError
from minigpt5 import prompts
from minigpt5.data.index import (
    VOKEN,
    ReadOptions,
    find_fault,
    first_template,
    read_bytes,
    unicode_fault,
    wanted_tasks,
)
from minigpt5.data.types import INPUT_PICTURE, Problem, Sample, Split, Task

SUFFIXES = {Task.GENERATION: "gen", Task.MULTIMODAL: "multimodal", Task.UNDERSTANDING: "understanding"}
STORIES, MAPPING = "cleaned", "image_mapping"


@dataclass(frozen=True, slots=True)
class Step:
    """One scene of a story."""

    caption: str
    picture: str
    """File, relative to the data folder."""
    sequence_index: Any


@dataclass(frozen=True)
class Story:
    """A story's usable steps, in file order."""

    name: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class VistIndex:
    """Samples of a VIST file, made on access."""

    options: ReadOptions
    entries: list[tuple[Story, int, Task]]
    problems: list[Problem]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        story, position, task = self.entries[index]
        return make_sample(story, position, task, self.options)


def make_sample(story: Story, position: int, task: Task, options: ReadOptions) -> Sample:
    """Return the sample of one step; ``options.context`` says what its prompt tells of the steps before."""
    step, history = story.steps[position], _known(story.steps[:position], options.context)
    with_pictures = options.context == "full"
    name = f"{story.name}_{step.sequence_index}-{SUFFIXES[task]}"
    picture = options.folder / step.picture
    inputs = tuple(options.folder / earlier.picture for earlier in history if with_pictures)
    prompt = prompts.story_history([earlier.caption for earlier in history], with_pictures=with_pictures)
    outputs: tuple[Path, ...] = (picture,)
    if task is Task.GENERATION:
        text = options.choose(name, prompts.VIST_GENERATION).format(prompt=prompt, step_text=step.caption)
        response = f"{options.voken_text} {prompts.STOP}"
    elif task is Task.MULTIMODAL:
        text = options.choose(name, prompts.VIST_MULTIMODAL).format(prompt=prompt)
        response = f"{step.caption} {options.voken_text} {prompts.STOP}"
    else:
        text = options.choose(name, prompts.VIST_UNDERSTANDING).format(prompt=prompt)
        response = f"{step.caption} {prompts.STOP}"
        inputs, outputs = (*inputs, picture), ()
    described = step.caption if task is Task.GENERATION else None
    return Sample(name, task, prompts.VIST_SYSTEM + text, response, inputs, outputs, description=described)


def _known(history: tuple[Step, ...], context: str) -> tuple[Step, ...]:
    if context == "none":
        return ()
    return history[-1:] if context == "last_text" else history


def read_vist(path: Path, options: ReadOptions) -> VistIndex:
    """Index a VIST file and the picture mapping beside it.

    A story ends at its first malformed step: what follows would lack its history. The test split has only
    ``generation`` samples unless others are asked for.

    Args:
        path: JSON of story id → steps, named ``*cleaned*``; ``*image_mapping*`` beside it maps picture id →
            file.
        options: ``tasks`` are of ``generation``, ``multimodal``, ``understanding``.

    Raises:
        InputError: a file is missing, misnamed or of another structure.
    """
    every = tuple(SUFFIXES)
    default = every[:1] if options.split is Split.TEST else every
    wanted = wanted_tasks(options.tasks, available=every, default=default)
    stories = _read_object(path)
    mapping = _read_object(mapping_path(path))
    problems: list[Problem] = []
    entries = []
    for name, steps in stories.items():
        story = _read_story(path, name, steps, mapping, problems)
        # Only a text that itself holds a placeholder can make a sample malformed.
        suspect = any(INPUT_PICTURE in step.caption or VOKEN.search(step.caption) for step in story.steps)
        for position, task in _variants(len(story.steps), wanted):
            if suspect:
                sample = make_sample(story, position, task, replace(options, choose=first_template))
                fault = find_fault(sample, options.voken_text)
                if fault is not None:
                    problems.append(Problem(f"{path}: {sample.id}", fault))
                    continue
            entries.append((story, position, task))
        if entries and options.head_bytes is not None:
            break
    return VistIndex(options, entries, problems)


def mapping_path(path: Path) -> Path:
    """Return the picture mapping that belongs to a story file.

    Raises:
        InputError: the name does not tell.
    """
    if STORIES not in path.name:
        raise InputError(f"{path}: a VIST story file is named *{STORIES}*.json, its mapping *{MAPPING}*.json")
    return path.with_name(path.name.replace(STORIES, MAPPING))


def _variants(steps: int, wanted: frozenset[Task]) -> Iterator[tuple[int, Task]]:
    """Yield step and task in the published order; the first step has no history to continue."""
    for position in range(steps):
        for task in SUFFIXES:
            if task in wanted and (task is Task.GENERATION or position > 0):
                yield position, task


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_bytes(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a JSON object wanted (id → value), found {type(values).__name__}")
    return values


def _read_story(path: Path, name: str, steps: Any, mapping: dict[str, Any], problems: list[Problem]) -> Story:
    good: list[Step] = []
    for position, step in enumerate(steps if isinstance(steps, list) else [steps]):
        fault = _step_fault(step, mapping)
        if fault is not None:
            problems.append(
                Problem(f"{path}: story {name}, step {position}", f"{fault}; the story ends before it")
            )
            break
        good.append(Step(step["caption"], mapping[str(step["image_id"])], step["sequence_index"]))
    return Story(name, tuple(good))


def _step_fault(step: Any, mapping: dict[str, Any]) -> str | None:
    if not isinstance(step, dict):
        return f"a step is an object, found {type(step).__name__}"
    missing = [key for key in ("caption", "image_id", "sequence_index") if key not in step]
    if missing:
        return f"no {' and '.join(missing)}"
    if not isinstance(step["caption"], str):
        return f"the caption is no text: {step['caption']!r}"
    if fault := unicode_fault(step["caption"]):
        return fault
    if not isinstance(mapping.get(str(step["image_id"])), str):
        return f"picture {step['image_id']!r} is not in the picture mapping"
    return None
