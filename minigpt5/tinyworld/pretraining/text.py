"""The text encoder again: what stands where must be readable from its states by cross-attention, as a UNet reads.

The contrastive loss shapes only the state that pools a caption; here the text encoder learns to be read, and to
say the same whatever the words: a caption loss that aims at its states then aims at the picture, not the wording.
It is read through noise, so that everything is said about equally loud: an attribute that makes up little of the
states' variance is the last that a squared error finds. Noise and sameness come once it is read without them:
before that, the states can become the same by losing what tells scenes apart, and do.
Shapes: B captions, Q text positions, E text width.
"""

from collections.abc import Mapping, Sequence
from random import Random

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from minigpt5.data.cc3m import clean_caption
from minigpt5.diffusion import CaptionTokenizer
from minigpt5.tinyworld.captions import caption
from minigpt5.tinyworld.pretraining.examples import any_scene
from minigpt5.tinyworld.pretraining.loop import Recipe, Scheduled
from minigpt5.tinyworld.pretraining.pool import python_random
from minigpt5.tinyworld.pretraining.reader import SceneReader, reading_loss
from minigpt5.tinyworld.scenes import Scene

RECIPE = Recipe(steps=2700, batch_size=64, learning_rate=1e-3, warmup_steps=200, version=2)

_NOISE = 3.0
"""Relative to the deviation of the states."""


class CaptionReader(nn.Module):
    """A text encoder and what reads its states.

    Args:
        text_encoder: trained.
    """

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.reader = SceneReader(text_encoder.config.hidden_size)


class ReadingObjective(Scheduled):
    """Loss of one step.

    Args:
        reader: trained.
        tokenizer: of its text encoder.
        recipe: batch size.
    """

    def __init__(self, reader: CaptionReader, tokenizer: CaptionTokenizer, recipe: Recipe) -> None:
        self.reader, self.tokenizer, self.recipe = reader, tokenizer, recipe
        super().__init__(recipe.steps)

    def __call__(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return the loss, its part by wording, and the share of captions of which everything is read right."""
        rng = python_random(generator)
        scenes = [any_scene(rng) for _ in range(self.recipe.batch_size // 2)]
        # Each scene twice, in other words: once as the caption loss reads a caption, once as the pipeline does.
        pair = [self.states(scenes, rng, masked=masked) for masked in (True, False)]
        states_BQE = torch.cat(pair)
        noise_BQE = torch.randn(states_BQE.shape, generator=generator).to(states_BQE)
        spread = states_BQE.detach().std(dim=0).mean()
        loss, right_B = reading_loss(
            self.reader.reader(states_BQE + self.hardness * _NOISE * spread * noise_BQE), scenes * 2
        )
        wording = wording_share(*pair)
        return {"loss": loss + self.hardness * wording, "wording": wording, "read": right_B.float().mean()}

    def states(self, scenes: Sequence[Scene], rng: Random, *, masked: bool) -> Tensor:
        """Return text states of fresh captions of the scenes, half of them in the form of CC3M's reader."""
        texts = [caption(scene, rng) for scene in scenes]
        texts = [clean_caption(text) if rng.random() < 0.5 else text for text in texts]
        return caption_states(self.reader.text_encoder, self.tokenizer, texts, masked=masked)


def wording_share(first_BQE: Tensor, second_BQE: Tensor) -> Tensor:
    """Return how much of the variance of the states of two captions a scene is between those two: 0 to about 1."""
    within = (first_BQE - second_BQE).square().sum() / 2
    states_BQE = torch.cat([first_BQE, second_BQE])
    return within / (states_BQE - states_BQE.mean(dim=0)).square().sum() * 2


def caption_states(
    text_encoder: CLIPTextModel, tokenizer: CaptionTokenizer, captions: Sequence[str], *, masked: bool
) -> Tensor:
    """Return text states ``[B, Q, E]`` without attention mask, as Stable Diffusion's pipeline, or with it.

    The caption loss of MiniGPT-5 aims at the latter, so both should mean the same picture.
    """
    inputs = tokenizer.encode_padded(list(captions)).to(text_encoder.device)
    mask = inputs["attention_mask"] if masked else None
    return text_encoder(inputs["input_ids"], attention_mask=mask)[0]
