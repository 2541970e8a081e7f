"""The language model: next-token prediction on the tiny world in the published templates.

Shapes: B texts, T tokens, V vocabulary.
"""

from collections.abc import Mapping
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from minigpt5.tinyworld.pretraining.examples import (
    SYSTEM_SHARE,
    Example,
    Maker,
    PictureWriter,
    caption_example,
    describe_example,
    dialogue_example,
    event_example,
    instruction_example,
    story_example,
    without_system,
)
from minigpt5.tinyworld.pretraining.loop import Recipe
from minigpt5.tinyworld.pretraining.pool import python_random
from minigpt5.vokens import IGNORE_INDEX

RECIPE = Recipe(steps=13_000, batch_size=32, learning_rate=2e-3, warmup_steps=200, weight_decay=0.05)


def _describe(rng: Random, _: str) -> Example:
    return describe_example(rng)


KINDS: tuple[tuple[Maker, float, float], ...] = (
    (_describe, 0.1, 0.75),
    (caption_example, 0.1, 1.0),
    (instruction_example, 0.05, 0.75),
    (event_example, 0.2, 1.0),
    (story_example, 0.25, 0.5),
    (dialogue_example, 0.3, 0.75),
)
"""Maker of examples, its share of the steps, and its batch relative to the recipe's: long texts come in fewer.

To tell what differs between two pictures is the hardest to learn, much easier in short texts than in long ones.
"""
_PROMPT_WEIGHT = 0.1
"""A prompt's tokens are many, and what they say is mostly chance."""


class LanguageObjective:
    """Loss of one step; a batch holds texts of one kind, so that little of it is padding.

    Args:
        model: trained.
        writer: tokens of examples.
        recipe: batch size.
    """

    def __init__(self, model: LlamaForCausalLM, writer: PictureWriter, recipe: Recipe) -> None:
        self.model, self.writer, self.recipe = model, writer, recipe

    def __call__(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return the loss, and its parts: the mean cross-entropies over the tokens of replies and of prompts."""
        ids_BT, labels_BT, is_reply_BT = (part.to(self.model.device) for part in self.batch(generator))
        logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        targets_BT = labels_BT[:, 1:]
        errors_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")
        is_reply_BT = is_reply_BT[:, 1:]
        reply = errors_BT[is_reply_BT].mean()
        prompt = errors_BT[(targets_BT != IGNORE_INDEX) & ~is_reply_BT].mean()
        return {"loss": reply + _PROMPT_WEIGHT * prompt, "reply": reply, "prompt": prompt}

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, labels and whether a position belongs to the reply, each ``[B, T]``.

        Texts are padded on the right, where causal attention needs no mask.
        """
        rng = python_random(generator)
        ((make, _, scale),) = rng.choices(KINDS, weights=[share for _, share, _ in KINDS])
        keeps_system = rng.random() < SYSTEM_SHARE
        rows, starts = [], []
        for _ in range(max(1, round(self.recipe.batch_size * scale))):
            example = make(rng, self.writer.voken_text)
            example = example if keeps_system else without_system(example)
            prompt = self.writer.prompt_ids(example)
            rows.append(prompt + self.writer.response_ids(example))
            starts.append(len(prompt))
        length = max(map(len, rows))
        ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
        labels_BT = torch.full_like(ids_BT, IGNORE_INDEX)
        is_reply_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids_BT[place, : len(row)] = labels_BT[place, : len(row)] = torch.tensor(row)
            is_reply_BT[place, start : len(row)] = True
        return ids_BT, labels_BT, is_reply_BT
