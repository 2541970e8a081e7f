"""What goes into a training step's losses and what comes out.

Shapes: B samples, T positions, H language width, R wanted pictures of the batch.
"""

from dataclasses import dataclass

from torch import Tensor

from minigpt5.assembly import Assembled
from minigpt5.diffusion import DiffusionDraws


@dataclass(frozen=True)
class Draws:
    """Every random draw of one training batch, one entry a wanted picture."""

    drop_R: Tensor
    """Whether the picture's conditioning is replaced by zeros (classifier-free guidance)."""
    diffusion: DiffusionDraws


@dataclass(frozen=True)
class Losses:
    """Loss terms of one batch, each a scalar mean. ``caption`` is None where no caption loss is taken."""

    total: Tensor
    text: Tensor
    image: Tensor
    caption: Tensor | None

    def as_dict(self) -> dict[str, Tensor]:
        """Return the terms under their published log names."""
        terms = {"loss": self.total, "text_loss": self.text, "image_loss": self.image}
        return terms if self.caption is None else {**terms, "caption_loss": self.caption}


@dataclass(frozen=True)
class LanguageStates:
    """What the language model makes of a batch."""

    prompt: Assembled
    hidden_BTH: Tensor
    """Last hidden states, behind the final norm."""
