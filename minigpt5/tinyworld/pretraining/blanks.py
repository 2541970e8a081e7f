"""The language model again: tokens it has never seen, where a picture belongs, must come to mean that picture.

A large language model makes something of new tokens; one as small as this has to learn to. New tokens get the
mean of the known rows, with noise: what vokens start from. The states that predict them must tell the picture's
words, in the end through noise, so that everything is said about equally loud. In the part ``blanks`` each state
tells all of them, which makes every attribute easy to find for a mapper that has seen little; in the part
``accord``, which follows, one each and a second one where there are more, all but the first state, which says
that a picture comes. And they must be, in the end, the states that the picture's mere caption would lead to: a
mapper that has learned from captions then understands stories and dialogues too. Half of each batch is text as
before, so that nothing is forgotten.
Shapes: B texts, T tokens, H language width, V vocabulary, P pictures, N blanks of one, X words of one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from minigpt5.tinyworld.captions import SEEN_WORDS, padded_words
from minigpt5.tinyworld.pretraining.examples import (
    BLANK,
    SYSTEM_SHARE,
    Example,
    Maker,
    PictureWriter,
    caption_example,
    dialogue_example,
    instruction_example,
    story_example,
    without_system,
)
from minigpt5.tinyworld.pretraining.language import LanguageObjective
from minigpt5.tinyworld.pretraining.loop import Recipe, Scheduled
from minigpt5.tinyworld.pretraining.pool import python_random
from minigpt5.tinyworld.scenes import Scene
from minigpt5.vokens import IGNORE_INDEX

RECIPE = Recipe(steps=3500, batch_size=32, learning_rate=1e-3, warmup_steps=100, weight_decay=0.05, version=4)
ACCORD_RECIPE = Recipe(
    steps=4000, batch_size=32, learning_rate=1e-3, warmup_steps=100, weight_decay=0.05, version=5
)
"""Of the part ``accord``, in which the states share the words."""
COUNT = 8
"""Blanks of a picture."""
_MAKERS: tuple[tuple[Maker, float], ...] = (
    (caption_example, 0.15),
    (instruction_example, 0.1),
    (story_example, 0.35),
    (dialogue_example, 0.4),
)
"""Maker of examples and its share of the steps; each picture's caption is learned from beside it."""
WORDS = SEEN_WORDS
"""Of a picture with as many things as there can be."""
CONTEXT_WEIGHT = 0.5
ACCORD_CONTEXT_WEIGHT = 2.5
"""Of the distance to the caption's states in ``blanks`` and in ``accord``. Little of a state comes from elsewhere
than the picture in the end, but the mapper would stumble over it; at first, the words are to be found."""
_PLAIN_SKIPPED = 0.6
"""Of the examples whose pictures show one thing: who learns first to tell one thing hardly finds the second."""
_NOISE = 0.5
"""Relative to the deviation of the known rows."""
READING_NOISE = 0.5
ACCORD_READING_NOISE = 1.5
"""In ``blanks`` and in ``accord``, relative to the states' root mean square, which the last norm holds: what a
state says beside the picture's words costs what it could say them with. So much that not all can be read through
it makes what has few values, a size, loud too, and leaves little of a state that is always the same.
"""
LOUDNESS = 3.0
"""Root mean square of the final norm's weights, and so about of the states, that ``accord`` ends with."""
_LITTLE = 0.25
"""Variance below which a direction of the states hardly counts, relative to their mean square."""


class BlankReader(nn.Module):
    """A language model, and what only training needs: a matrix for each word, by which every state tells it.

    Args:
        model: trained.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        width = model.config.hidden_size
        self.places = nn.Linear(width, WORDS * width)

    def forward(self, states_PNH: Tensor) -> Tensor:
        """Return logits of the picture's words by each state ``[P, N, X, V]``."""
        return self.model.lm_head(self.places(states_PNH).unflatten(-1, (WORDS, -1)))


class AccordReader(nn.Module):
    """A language model, and what only training needs: a state's second word, behind the first words of all states.

    Args:
        model: trained.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.second = nn.Linear(model.config.hidden_size, model.config.hidden_size)

    def forward(self, states_PNH: Tensor) -> Tensor:
        """Return logits of the picture's words ``[P, 1, X, V]`` by all states but the first together."""
        telling_PNH = states_PNH[:, 1:]
        telling_PXH = torch.cat([telling_PNH, self.second(telling_PNH)], dim=1)
        return self.model.lm_head(telling_PXH[:, None, :WORDS])


class BlankObjective(Scheduled):
    """Loss of one step.

    Args:
        reader: trained.
        writer: tokens of examples.
        recipe: batch size.
        context_weight: of how far states are from those that captions lead to.
        reading_noise: added to the states, relative to their root mean square.
    """

    def __init__(
        self,
        reader: BlankReader | AccordReader,
        writer: PictureWriter,
        recipe: Recipe,
        context_weight: float = CONTEXT_WEIGHT,
        reading_noise: float = READING_NOISE,
    ) -> None:
        super().__init__(recipe.steps)
        self.reader, self.model, self.writer = reader, reader.model, writer
        self.context_weight, self.reading_noise = context_weight, reading_noise
        self.batch_size = max(1, recipe.batch_size // 2)
        self.text = LanguageObjective(reader.model, writer, replace(recipe, batch_size=self.batch_size))

    def __call__(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return the loss, its parts, and what share tells every word.

        It is a share of the states by a :class:`BlankReader`, of the pictures by an :class:`AccordReader`.
        """
        text = self.text(generator)["loss"]
        rng = python_random(generator)
        examples = self.draw(rng)
        scenes = [scene for example in examples for scene in example.outputs]
        states_PNH, errors = self.states(examples, generator)
        captions = [caption_example(rng, self.writer.voken_text, scene) for scene in scenes]
        plain_PNH, plain_errors = self.states(captions, generator)
        context = context_share(states_PNH, plain_PNH)
        states_PNH = torch.cat([states_PNH, plain_PNH])
        noise_PNH = torch.randn(states_PNH.shape, generator=generator).to(states_PNH)
        loudness = states_PNH.detach().square().mean().sqrt()
        logits_PNXV = self.reader(states_PNH + self.hardness * self.reading_noise * loudness * noise_PNH)
        words_PX = self.words(scenes * 2).to(states_PNH.device)
        words_PNX = words_PX[:, None].expand(logits_PNXV.shape[:-1])
        told = F.cross_entropy(logits_PNXV.flatten(0, 2), words_PNX.flatten())
        right_PNX = logits_PNXV.argmax(dim=-1) == words_PNX
        return {
            "loss": text + (errors + plain_errors) / 2 + told + self.hardness * self.context_weight * context,
            "text": text,
            "told": told,
            "context": context,
            "all_told": right_PNX.all(dim=-1).float().mean(),
        }

    def states(self, examples: Sequence[Example], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the states that predict the blanks ``[P, N, H]``, and the mean error over the other tokens."""
        ids_BT = self.tokens(examples).to(self.model.device)
        hidden_BTH = self.model.model(inputs_embeds=self.embed(ids_BT, generator), use_cache=False)[0]
        rows_P, starts_P = blank_starts(ids_BT)
        places_PN = starts_P[:, None] - 1 + torch.arange(COUNT, device=ids_BT.device)
        return hidden_BTH[rows_P[:, None], places_PN], self.text_loss(hidden_BTH, ids_BT)

    def draw(self, rng: Random) -> list[Example]:
        """Draw examples of one kind whose replies hold a picture, about half of them pictures of two things."""
        ((make, _),) = rng.choices(_MAKERS, weights=[share for _, share in _MAKERS])
        keeps_system = rng.random() < SYSTEM_SHARE
        examples: list[Example] = []
        while len(examples) < self.batch_size:
            example = make(rng, self.writer.voken_text)
            if not example.outputs:
                continue
            if all(len(scene.things) == 1 for scene in example.outputs) and rng.random() < _PLAIN_SKIPPED:
                continue
            examples.append(example if keeps_system else without_system(example))
        return examples

    def tokens(self, examples: Sequence[Example]) -> Tensor:
        """Return ids ``[B, T]`` with :data:`~minigpt5.tinyworld.pretraining.examples.BLANK` for each blank."""
        rows = [
            torch.tensor(self.writer.prompt_ids(example) + self.writer.blank_response_ids(example, COUNT))
            for example in examples
        ]
        # Behind a text's end, where causal attention needs no mask.
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.writer.tokenizer.pad_id)

    def words(self, scenes: Sequence[Scene]) -> Tensor:
        """Return the ids of each picture's words ``[P, X]``, of dots for a second thing that is not there."""
        return torch.tensor([self.writer.tokenizer.encode(padded_words(scene)) for scene in scenes])

    def embed(self, ids_BT: Tensor, generator: torch.Generator) -> Tensor:
        """Return embeddings ``[B, T, H]``; every blank is the mean row with noise of its own."""
        rows_VH = self.model.get_input_embeddings().weight
        noise_BTH = torch.randn(*ids_BT.shape, rows_VH.shape[1], generator=generator).to(rows_VH)
        blank_BTH = rows_VH.mean(dim=0) + _NOISE * rows_VH.detach().std(dim=0) * noise_BTH
        known_BTH = F.embedding(ids_BT.clamp(min=0), rows_VH)
        return torch.where((ids_BT == BLANK)[..., None], blank_BTH, known_BTH)

    def text_loss(self, hidden_BTH: Tensor, ids_BT: Tensor) -> Tensor:
        """Return the mean cross-entropy over what is neither blank nor padding."""
        targets_BT = ids_BT[:, 1:].masked_fill(
            (ids_BT[:, 1:] == BLANK) | (ids_BT[:, 1:] == self.writer.tokenizer.pad_id), IGNORE_INDEX
        )
        logits_BTV = self.model.lm_head(hidden_BTH[:, :-1])
        return F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, ignore_index=IGNORE_INDEX)


@torch.no_grad()
def set_loudness(model: LlamaForCausalLM) -> None:
    """Scale the last states to :data:`LOUDNESS`, and the head that reads them back: the same words follow.

    Weight decay leaves them at about 1, and a mapper that is fed states so small learns more slowly.
    """
    norm = model.model.norm.weight
    factor = LOUDNESS / norm.square().mean().sqrt()
    norm *= factor
    model.lm_head.weight /= factor


def context_share(first_PNH: Tensor, second_PNH: Tensor) -> Tensor:
    """Return how much of the variance of the states of two contexts a picture is between those two: 0 to about 1.

    Every direction of a state counts alike, unless it varies little: otherwise the share would become small by
    saying what is told alike in all contexts, a position, loudly in every state.
    """
    states_PNH = torch.cat([first_PNH, second_PNH])
    width = states_PNH.shape[-1]
    least = _LITTLE * states_PNH.detach().square().mean()
    variance_NHH = _products(states_PNH - states_PNH.mean(dim=0))
    within_NHH = _products(first_PNH - second_PNH) / 2
    loaded_NHH = variance_NHH + least * torch.eye(width).to(variance_NHH)
    both_NHH = torch.linalg.solve(loaded_NHH, torch.cat([within_NHH, variance_NHH], dim=-1))
    within_NHH, variance_NHH = both_NHH.split(width, dim=-1)
    return within_NHH.diagonal(dim1=1, dim2=2).sum() / variance_NHH.diagonal(dim1=1, dim2=2).sum()


def _products(states_PNH: Tensor) -> Tensor:
    """Return the mean products of the channels of each state ``[N, H, H]``."""
    states_NPH = states_PNH.transpose(0, 1)
    return states_NPH.transpose(1, 2) @ states_NPH / len(states_PNH)


def blank_starts(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and position of the first blank of each run, in order."""
    is_blank_BT = ids_BT == BLANK
    before_BT = F.pad(is_blank_BT[:, :-1], (1, 0))
    rows_P, starts_P = (is_blank_BT & ~before_BT).nonzero(as_tuple=True)
    return rows_P, starts_P
