"""A chat with the model: turns of text and pictures, written as the prompt the model was trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from minigpt5 import prompts
from minigpt5.data.types import INPUT_PICTURE, Prompt, Reply
from minigpt5.images import expand2square


@dataclass(frozen=True)
class Turn:
    """What one side said. ``text`` holds one picture mark per picture of ``images``."""

    speaker: str
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass
class Conversation:
    """The turns so far and the system prompt before them.

    Pictures of earlier turns, given and generated alike, are seen by the model in later ones.
    """

    system: str = prompts.VIST_SYSTEM
    turns: list[Turn] = field(default_factory=list)

    def ask(
        self, text: str, images: Sequence[Image.Image] = (), fits: Callable[[Prompt], bool] = lambda prompt: True
    ) -> Prompt:
        """Add a question and return the prompt for its answer.

        Args:
            text: may hold ``<ImageHere>`` where a picture belongs; pictures without one are put before the text.
            images: pictures, in the order of their marks; squared with white, as when the model was trained.
            fits: whether the model can read a prompt (:meth:`minigpt5.model.MiniGPT5.fits`). The oldest questions
                and their answers are left out of the prompt, not of the conversation, until it can.

        Raises:
            ValueError: more marks than pictures, or a question that does not even fit alone; it is not added.
        """
        marks = text.count(INPUT_PICTURE)
        if marks > len(images):
            raise ValueError(f"the text holds {marks} {INPUT_PICTURE} but {len(images)} pictures are given")
        text = mark_pictures(text)
        before = prompts.PICTURE * (len(images) - marks)
        squared = tuple(expand2square(image.convert("RGB")) for image in images)
        self.turns.append(Turn(prompts.HUMAN, f"{before}{text} ", squared))
        starts = [number for number, turn in enumerate(self.turns) if turn.speaker == prompts.HUMAN]
        prompt = next(filter(fits, map(self.prompt, starts)), None)
        if prompt is None:
            self.take_back()
            raise ValueError("the question is longer than the model can read; shorten it")
        return prompt

    def take_back(self) -> None:
        """Remove the newest question, which got no answer."""
        if self.turns and self.turns[-1].speaker == prompts.HUMAN:
            self.turns.pop()

    def answer(self, reply: Reply) -> None:
        """Add the model's reply, pictures in place."""
        parts = [part if isinstance(part, str) else prompts.PICTURE for part in reply.parts]
        self.turns.append(Turn(prompts.ASSISTANT, f"{' '.join(parts)}\n", reply.images))

    def prompt(self, start: int = 0) -> Prompt:
        """Return the conversation from a turn on as a prompt that waits for the assistant."""
        text = self.system + "".join(f"{turn.speaker} {turn.text}" for turn in self.turns[start:])
        images = tuple(image for turn in self.turns[start:] for image in turn.images)
        return Prompt(f"turn-{len(self.turns)}", text + prompts.ASSISTANT, images)


def mark_pictures(text: str) -> str:
    """Put every bare ``<ImageHere>`` into ``<Img>…</Img>``, as the model saw it in training.

    The published playground left one ``</Img>`` out.
    """
    whole, half = prompts.PICTURE, f"<Img>{INPUT_PICTURE}"
    bare = text.replace(whole, INPUT_PICTURE).replace(half, INPUT_PICTURE)
    return bare.replace(INPUT_PICTURE, whole)
