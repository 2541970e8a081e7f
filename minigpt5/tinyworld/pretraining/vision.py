"""Eyes for the language model: ViT, Q-Former and projection learn to see, then to make the frozen model reply.

First the ViT learns to hold what a picture shows, so that it can be read from its states; then it, Q-Former and
projection learn to tell it in the language model's own words, a query each. That is in the place of EVA-CLIP's and
BLIP-2's representation learning, which would take many more pictures. Then, as MiniGPT-4's alignment: the loss is
the reply's, given the picture; half of the replies describe it. In the rest pictures stand in stories and
dialogues, where the language model has so far read them in words.
Shapes: B examples, T tokens, P pictures, L queries a picture, H language width, S side in pixels, V vocabulary,
N pictures of the pool.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import normalize
from transformers import LlamaForCausalLM

from minigpt4.qformer import QFormer
from minigpt4.vision import VisionEncoder
from minigpt5.images import CLIP_MEAN, CLIP_STD
from minigpt5.tinyworld.pretraining.examples import (
    SYSTEM_SHARE,
    Example,
    PictureWriter,
    describe_example,
    dialogue_example,
    story_example,
    without_system,
)
from minigpt5.tinyworld.pretraining.loop import Recipe
from minigpt5.tinyworld.pretraining.pool import Pool, python_random
from minigpt5.tinyworld.pretraining.reader import SceneReader, reading_loss
from minigpt5.tinyworld.renderer import render
from minigpt5.vokens import IGNORE_INDEX

SIGHT_RECIPE = Recipe(steps=4000, batch_size=32, learning_rate=1e-3, warmup_steps=100, weight_decay=0.05)
EYES_RECIPE = Recipe(steps=10_000, batch_size=32, learning_rate=1e-3, warmup_steps=300, weight_decay=0.05)
RECIPE = Recipe(steps=2400, batch_size=32, learning_rate=3e-4, warmup_steps=100, weight_decay=0.05)
_SHARPNESS = 10.0
"""Of the softmax over distances to words: two words are about twice their variance apart."""
_DESCRIBE_SHARE = 0.5
_STORY_SCALE = 0.25
"""Batch of stories and dialogues, relative to the recipe's."""


class Eyes(nn.Module):
    """Pictures → what stands for them in a prompt."""

    def __init__(self, vision: VisionEncoder, qformer: QFormer, projection: nn.Linear) -> None:
        super().__init__()
        self.vision, self.qformer, self.projection = vision, qformer, projection

    def forward(self, pixels_P3SS: Tensor) -> Tensor:
        """Return ``[P, L, H]`` for normalised pictures."""
        return self.projection(self.qformer(self.vision(pixels_P3SS)))


class PictureReader(nn.Module):
    """What sees, and what reads its states.

    Args:
        seer: normalised pictures → states; trained.
        width: of the states.
    """

    def __init__(self, seer: nn.Module, width: int) -> None:
        super().__init__()
        self.seer = seer
        self.reader = SceneReader(width)


class SightObjective:
    """Loss of one step of the ViT's learning to see.

    Args:
        reader: trained.
        pool: pictures.
        recipe: batch size.
    """

    def __init__(self, reader: PictureReader, pool: Pool, recipe: Recipe) -> None:
        self.reader, self.pool, self.recipe = reader, pool, recipe

    def __call__(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return the sum of the cross-entropies, and the share of pictures of which everything is read right."""
        numbers = self.pool.draw(generator, self.recipe.batch_size)
        pixels_P3SS = normalize(self.pool.pixels(numbers), list(CLIP_MEAN), list(CLIP_STD))
        pixels_P3SS = pixels_P3SS.to(self.reader.reader.background.weight.device)
        found = self.reader.reader(self.reader.seer(pixels_P3SS))
        loss, right_P = reading_loss(found, [self.pool.scenes[number] for number in numbers])
        return {"loss": loss, "read": right_P.float().mean()}


class EyesObjective:
    """Loss of one step: query i's output must be the embedding of the picture's word i.

    Args:
        eyes: trained, the ViT too.
        words_VH: the language model's embeddings, frozen.
        writer: words of pictures.
        pool: pictures.
        recipe: batch size.
    """

    def __init__(self, eyes: Eyes, words_VH: Tensor, writer: PictureWriter, pool: Pool, recipe: Recipe) -> None:
        self.eyes, self.words_VH, self.pool, self.recipe = eyes, words_VH.detach(), pool, recipe
        self.targets_NL = torch.tensor([writer.seen_ids(scene) for scene in pool.scenes])
        self.spread = float(self.words_VH.var(dim=0).sum())

    def __call__(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return the loss, the relative squared error, and the share of pictures of which every word is right."""
        numbers = self.pool.draw(generator, self.recipe.batch_size)
        pixels_P3SS = normalize(self.pool.pixels(numbers), list(CLIP_MEAN), list(CLIP_STD))
        told_PLH = self.eyes(pixels_P3SS.to(self.words_VH.device))
        targets_PL = self.targets_NL[numbers].to(told_PLH.device)
        error = (told_PLH - self.words_VH[targets_PL]).square().sum(dim=-1).mean() / self.spread
        # The nearest word must be the right one: a softmax over squared distances.
        logits_PLV = -torch.cdist(told_PLH, self.words_VH).square() * (_SHARPNESS / self.spread)
        right_P = (logits_PLV.argmax(dim=-1) == targets_PL).all(dim=1)
        loss = error + F.cross_entropy(logits_PLV.transpose(1, 2), targets_PL)
        return {"loss": loss, "error": error, "told": right_P.float().mean()}


class VisionObjective:
    """Loss of one step.

    Args:
        eyes: trained, but for the ViT.
        language_model: frozen.
        writer: tokens of examples.
        recipe: batch size.
    """

    def __init__(
        self, eyes: Eyes, language_model: LlamaForCausalLM, writer: PictureWriter, recipe: Recipe
    ) -> None:
        self.eyes, self.language_model, self.writer, self.recipe = eyes, language_model, writer, recipe
        language_model.requires_grad_(False)
        eyes.vision.requires_grad_(False)

    def __call__(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return the mean cross-entropy over the replies' tokens."""
        rng = python_random(generator)
        if rng.random() < _DESCRIBE_SHARE:
            examples = [describe_example(rng) for _ in range(self.recipe.batch_size)]
        else:
            make = rng.choice((story_example, dialogue_example))
            count = max(1, round(self.recipe.batch_size * _STORY_SCALE))
            examples = [make(rng, self.writer.voken_text) for _ in range(count)]
        if rng.random() >= SYSTEM_SHARE:
            examples = [without_system(example) for example in examples]
        device = self.language_model.device
        ids_BT, labels_BT = (part.to(device) for part in self.tokens(examples))
        embeds_BTH = self.language_model.get_input_embeddings()(ids_BT.clamp(min=0))
        pictures = [render(scene, rng) for example in examples for scene in example.inputs]
        if pictures:
            features_PLH = self.eyes(to_pixels(pictures).to(device))
            embeds_BTH = embeds_BTH.masked_scatter((ids_BT < 0)[..., None], features_PLH)
        hidden_BTH = self.language_model.model(inputs_embeds=embeds_BTH, use_cache=False).last_hidden_state
        targets_BT = labels_BT[:, 1:]
        wanted_BT = targets_BT != IGNORE_INDEX
        logits_XV = self.language_model.lm_head(hidden_BTH[:, :-1][wanted_BT])
        loss = F.cross_entropy(logits_XV, targets_BT[wanted_BT])
        # A batch of first turns may show no picture at all; its gradient is zero.
        return {"loss": loss + 0 * self.eyes.projection.bias.sum()}

    def tokens(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Return ids, −1 at each position of a picture, and labels of the replies, each ``[B, T]``."""
        width = self.eyes.qformer.query_tokens.shape[1]
        rows, labels = [], []
        for example in examples:
            prompt = [self.writer.tokenizer.bos_id]
            for index in self.writer.tokenizer.encode(example.prompt):
                prompt += [-1] * width if index == self.writer.ids.picture else [index]
            response = self.writer.response_ids(example)
            rows.append(torch.tensor(prompt + response))
            labels.append(torch.tensor([IGNORE_INDEX] * len(prompt) + response))
        pad = nn.utils.rnn.pad_sequence
        return pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORE_INDEX)


def to_pixels(pictures: Sequence[object]) -> Tensor:
    """Return Pillow pictures as the vision encoder's input ``[P, 3, S, S]``."""
    bytes_PSS3 = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return normalize(bytes_PSS3.permute(0, 3, 1, 2).float() / 255, list(CLIP_MEAN), list(CLIP_STD))
