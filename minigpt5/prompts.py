"""Every prompt template, system prompt and stop string, in one home.

The strings are the ones the published checkpoints were trained with, spelling included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from minigpt5.data.types import INPUT_PICTURE

STOP = "###"
"""Ends a turn: responses end with it and decoding stops at it."""
HUMAN = "###Human:"
ASSISTANT = "###Assistant:"
PICTURE = f"<Img>{INPUT_PICTURE}</Img>"
"""One input picture as it stands in a prompt."""

CC3M_SYSTEM = "You will be able to generate image according to command."
CC3M_GENERATION = (
    "generate image with caption:",
    "can you give me the image with caption:",
    "help me to generate this image:",
    "generate image with according to caption:",
    "according to caption, generate image:",
    "an image with caption:",
    "can you visualize this caption:",
)

_PICTURES_FOLLOW = (
    "Give the following images in <Img>ImageContent</Img> format. "
    "You will be able to see the images once I provide it to you. "
)

VIST_SYSTEM = _PICTURES_FOLLOW + "Please understanding images and generate story."
VIST_GENERATION = (
    "###Human:{prompt} Generate an image with the scene description: {step_text} ###Assistant:",
    "###Human:{prompt} the scene description: {step_text} ###Assistant:",
)
VIST_MULTIMODAL = (
    "###Human:{prompt} Tell me the next scene with image. ###Assistant:",
    "###Human:{prompt} Generate the next scene with image. ###Assistant:",
    "###Human:{prompt} What should happen then? ###Assistant:",
)
VIST_UNDERSTANDING = (
    f"###Human:{{prompt}} Tell me the next scene description by this image: {PICTURE} ###Assistant:",
    f"###Human:{{prompt}} What happen in the next scene image: {PICTURE} ###Assistant:",
)

MMDIALOG_SYSTEM = _PICTURES_FOLLOW + "Please generate conversations with appropriate images."

Choose = Callable[[str, Sequence[str]], str]
"""Picks one template of a group for a sample id."""


@dataclass(frozen=True)
class HashedChoice:
    """A chooser that gives the same sample the same template, whatever the order of access."""

    seed: int

    def __call__(self, sample_id: str, group: Sequence[str]) -> str:
        """Return the sample's template."""
        digest = sha256(f"{self.seed}:{sample_id}".encode()).digest()
        return group[int.from_bytes(digest[:8], "little") % len(group)]


def cc3m_instruction(command: str, caption: str) -> str:
    """Return a caption asked for as a picture by a generation prompt."""
    return f"{CC3M_SYSTEM}{HUMAN} {command} {caption} {ASSISTANT}"


def story_history(captions: Sequence[str], *, with_pictures: bool = True) -> str:
    """Return a story so far, a picture behind each caption if wanted; empty before the first step."""
    if not captions:
        return ""
    return PICTURE.join(captions) + f"{PICTURE}\n" if with_pictures else " ".join(captions) + "\n"


def dialogue_history(turns: Sequence[tuple[str, bool]], *, first_speaker: str = HUMAN) -> str:
    """Return the prompt for the turn behind ``turns``, up to and including the next speaker's tag.

    Args:
        turns: text and whether a picture follows it, oldest first.
        first_speaker: tag of the oldest turn; speakers alternate.
    """
    speakers = (HUMAN, ASSISTANT) if first_speaker == HUMAN else (ASSISTANT, HUMAN)
    parts = [MMDIALOG_SYSTEM]
    for index, (text, has_picture) in enumerate(turns):
        parts.append(f"{speakers[index % 2]} {text}" + (f" {PICTURE}" if has_picture else ""))
    parts.append(speakers[len(turns) % 2])
    return " ".join(parts)
