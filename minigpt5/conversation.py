"""A chat with the model: turns of text and pictures, written as the prompt the model was trained on."""

from collections.abc import Sequence
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

    def ask(self, text: str, images: Sequence[Image.Image] = ()) -> Prompt:
        """Add a question and return the prompt for its answer.

        Args:
            text: may hold ``<ImageHere>`` where a picture belongs; pictures without one are put before the text.
            images: pictures, in the order of their marks; squared with white, as when the model was trained.

        Raises:
            ValueError: more marks than pictures.
        """
        marks = text.count(INPUT_PICTURE)
        if marks > len(images):
            raise ValueError(f"the text holds {marks} {INPUT_PICTURE} but {len(images)} pictures are given")
        text = mark_pictures(text)
        before = prompts.PICTURE * (len(images) - marks)
        squared = tuple(expand2square(image.convert("RGB")) for image in images)
        self.turns.append(Turn(prompts.HUMAN, f"{before}{text} ", squared))
        return self.prompt()

    def answer(self, reply: Reply) -> None:
        """Add the model's reply, pictures in place."""
        parts = [part if isinstance(part, str) else prompts.PICTURE for part in reply.parts]
        self.turns.append(Turn(prompts.ASSISTANT, f"{' '.join(parts)}\n", reply.images))

    def prompt(self) -> Prompt:
        """Return the whole conversation as a prompt that waits for the assistant."""
        text = self.system + "".join(f"{turn.speaker} {turn.text}" for turn in self.turns)
        images = tuple(image for turn in self.turns for image in turn.images)
        return Prompt(f"turn-{len(self.turns)}", text + prompts.ASSISTANT, images)


def mark_pictures(text: str) -> str:
    """Put every bare ``<ImageHere>`` into ``<Img>…</Img>``, as the model saw it in training.

    The published playground left one ``</Img>`` out.
    """
    whole, half = prompts.PICTURE, f"<Img>{INPUT_PICTURE}"
    bare = text.replace(whole, INPUT_PICTURE).replace(half, INPUT_PICTURE)
    return bare.replace(INPUT_PICTURE, whole)
