"""Prompts and replies for the language side, in the published templates, with scenes in the place of pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from minigpt4.tokenizer import LlamaTokenizer
from minigpt5 import prompts
from minigpt5.data import mmdialog, vist
from minigpt5.data.cc3m import clean_caption
from minigpt5.data.index import ReadOptions
from minigpt5.data.types import Sample, Split, Task
from minigpt5.tinyworld.captions import caption, in_reading_order, plain_words, seen_words
from minigpt5.tinyworld.dialogues import make_dialogue
from minigpt5.tinyworld.scenes import Scene, random_scene
from minigpt5.tinyworld.stories import Step, make_story
from minigpt5.vokens import VokenIds, voken_text

DESCRIBE = (
    *(prompts.VIST_SYSTEM + text.format(prompt="") for text in prompts.VIST_UNDERSTANDING),
    f"{prompts.HUMAN} {prompts.PICTURE} Describe this image in detail. {prompts.ASSISTANT}",
)
"""Wishes for a description; the last is MiniGPT-4's own."""
SYSTEM_SHARE = 0.25
"""Steps whose prompts keep their system prompt; it is long and tells nothing."""
BLANK = -1
"""Stands for a token that the language model has never seen."""
_CLOSE_PICTURE = prompts.PICTURE.split(">", maxsplit=2)[-1]
_OPEN_PICTURE = "<Img>"
_SEEDS = 2**40


@dataclass(frozen=True)
class Example:
    """A prompt with its reply; scenes stand for the pictures of both, in order."""

    prompt: str
    response: str
    inputs: tuple[Scene, ...] = ()
    outputs: tuple[Scene, ...] = ()


def any_scene(rng: Random) -> Scene:
    """Draw a training scene of one or two things."""
    return random_scene(rng, "train", things=rng.choice((1, 1, 2)))


def describe_example(rng: Random) -> Example:
    """Ask for the description of a picture, from its top to its bottom."""
    scene = in_reading_order(any_scene(rng))
    return Example(rng.choice(DESCRIBE), f"{caption(scene, rng)} {prompts.STOP}", (scene,))


def caption_example(rng: Random, vokens: str, scene: Scene | None = None) -> Example:
    """Ask for a picture by its caption, as in CC3M; of ``scene`` or of any."""
    scene = scene or any_scene(rng)
    return Example(clean_caption(caption(scene, rng)), f"{vokens} {prompts.STOP}", (), (scene,))


def instruction_example(rng: Random, vokens: str) -> Example:
    """Ask for a picture by an instruction with its caption, as in CC3M."""
    example = caption_example(rng, vokens)
    return replace(example, prompt=prompts.cc3m_instruction(rng.choice(prompts.CC3M_GENERATION), example.prompt))


def story_example(rng: Random, vokens: str) -> Example:
    """Ask for a step of a story, in words, as a picture or both, as in VIST."""
    steps = _any_story(rng)
    task = rng.choice((Task.GENERATION, Task.MULTIMODAL, Task.UNDERSTANDING))
    position = rng.randrange(0 if task is Task.GENERATION else 1, len(steps))
    return _story_step(steps, position, task, rng, vokens)


def event_example(rng: Random, vokens: str) -> Example:
    """Ask what happens between two pictures of a story, as in VIST where only one step came before."""
    steps = _any_story(rng)
    start = rng.randrange(len(steps) - 1)
    return _story_step(steps[start : start + 2], 1, Task.UNDERSTANDING, rng, vokens)


def _any_story(rng: Random) -> tuple[Step, ...]:
    return make_story(rng.randrange(_SEEDS), "train", 0).steps


def _story_step(steps: Sequence[Step], position: int, task: Task, rng: Random, vokens: str) -> Example:
    story = vist.Story("", tuple(vist.Step(step.text, str(place), place) for place, step in enumerate(steps)))
    options = ReadOptions(
        split=Split.TRAIN,
        folder=Path(),
        voken_text=vokens,
        choose=lambda _, group: rng.choice(group),
        count_tokens=len,
    )
    sample = vist.make_sample(story, position, task, options)
    return _from_sample(sample, [step.scene for step in steps])


def dialogue_example(rng: Random, vokens: str) -> Example:
    """Ask for the next turn of a dialogue, as in MMDialog."""
    said = make_dialogue(rng.randrange(_SEEDS), "train", 0)
    turns = [mmdialog.Turn(turn.text, str(place) if turn.scene else None) for place, turn in enumerate(said)]
    position = rng.randrange(1, len(turns))
    sample = mmdialog.make_sample("", turns[: position + 1], Path(), vokens)
    return _from_sample(sample, [turn.scene for turn in said])


def _from_sample(sample: Sample, scenes: Sequence[Scene | None]) -> Example:
    def shown(paths: tuple[Path, ...]) -> tuple[Scene, ...]:
        found = [scenes[int(path.name)] for path in paths]
        return tuple(scene for scene in found if scene is not None)

    return Example(sample.prompt, sample.response, shown(sample.input_images), shown(sample.output_images))


def without_system(example: Example) -> Example:
    """Leave out the system prompt, the same in all of a data set's prompts."""
    start = example.prompt.find(prompts.HUMAN)
    return example if start < 0 else replace(example, prompt=example.prompt[start:])


class PictureWriter:
    """Tokens of examples with every picture written out in words: ``<Img>night big red star upper left</Img>``.

    A prompt's picture is always written in as many words, as one that is seen takes always as many tokens.
    A language model that has read such text knows what a picture's place holds before it has seen one.

    Args:
        tokenizer: without vokens; they are added here.
        count: vokens a picture.
    """

    def __init__(self, tokenizer: LlamaTokenizer, count: int = 8) -> None:
        self.tokenizer = tokenizer
        self.ids = VokenIds.install(tokenizer, count)
        self.voken_text = voken_text(count)

    def prompt_ids(self, example: Example) -> list[int]:
        """Return a prompt's ids with the beginning-of-sequence token, its pictures written out."""
        scenes = iter(example.inputs)
        ids = [self.tokenizer.bos_id]
        for index in self.tokenizer.encode(example.prompt):
            ids += self.seen_ids(next(scenes)) if index == self.ids.picture else [index]
        return ids

    def response_ids(self, example: Example) -> list[int]:
        """Return a reply's ids, each run of vokens written out as a picture."""
        scenes = iter(example.outputs)
        ids: list[int] = []
        for index in self.tokenizer.encode(example.response):
            if index == self.ids.first:
                ids += self.tokenizer.encode(_OPEN_PICTURE)
                ids += self.word_ids(next(scenes))
                ids += self.tokenizer.encode(_CLOSE_PICTURE)
            elif index not in self.ids.vokens:
                ids.append(index)
        return ids

    def blank_response_ids(self, example: Example, count: int) -> list[int]:
        """Return a reply's ids with ``count`` times :data:`BLANK` for each picture."""
        ids: list[int] = []
        for index in self.tokenizer.encode(example.response):
            if index == self.ids.first:
                ids += [BLANK] * count
            elif index not in self.ids.vokens:
                ids.append(index)
        return ids

    def word_ids(self, scene: Scene) -> list[int]:
        """Return the ids of a scene's plain words."""
        return self.tokenizer.encode(plain_words(scene))

    def seen_ids(self, scene: Scene) -> list[int]:
        """Return the ids of the words that a picture tells, one each."""
        return self.tokenizer.encode(seen_words(scene))


Maker = Callable[[Random, str], Example]
"""Random source and voken text → example."""
