"""Two contrastive pairs: the vision encoder with Stable Diffusion's text encoder, and open_clip's CLIP for scores.

The first pair gives the language side its eyes (EVA-CLIP) and the diffusion model its frozen text encoder; the
second only scores, and shares nothing with the first. What stands in which cell must also be readable from the
second's joint vectors, by the same matrix from pictures and texts: so few pictures teach a contrast alone little.
Shapes: B pictures and captions, T tokens, S patches and the class token, D vision width, E text width, J joint.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from torch import Tensor, nn
from torchvision.transforms.functional import normalize
from transformers import CLIPTextModel

from minigpt4.vision import VisionEncoder
from minigpt5.diffusion import CaptionTokenizer
from minigpt5.images import CLIP_MEAN, CLIP_STD
from minigpt5.tinyworld.pretraining.loop import Recipe
from minigpt5.tinyworld.pretraining.pool import Pool
from minigpt5.tinyworld.pretraining.reader import JointReader, reading_loss

RECIPE = Recipe(steps=4000, batch_size=64, learning_rate=1e-3, warmup_steps=200, weight_decay=0.05)
SCORER_RECIPE = Recipe(steps=2700, batch_size=64, learning_rate=1e-3, warmup_steps=200, weight_decay=0.05)
_FIRST_LOGIT_SCALE = math.log(1 / 0.07)
_LARGEST_LOGIT_SCALE = math.log(100)
"""Both as in CLIP (arXiv 2103.00020, section 2.5)."""


class PeriodicEmbedding(nn.Embedding):
    """A token embedding whose row i is row i mod R: what a compact CLIP stores."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return ``[B, T, E]``."""
        return super().forward(ids_BT % self.num_embeddings)


class VisionTextPair(nn.Module):
    """The backbone's picture encoder and Stable Diffusion's text encoder, with heads that only training needs."""

    def __init__(self, vision: VisionEncoder, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.vision, self.text_encoder = vision, text_encoder
        joint = text_encoder.config.projection_dim
        self.vision_head = nn.Linear(vision.model.config.hidden_size, joint, bias=False)
        self.text_head = nn.Linear(text_encoder.config.hidden_size, joint, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(_FIRST_LOGIT_SCALE))

    def forward(self, pixels_B3SS: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return joint vectors ``[B, J]`` of normalised pictures and of their captions."""
        pictures_BJ = self.vision_head(self.vision(pixels_B3SS).mean(dim=1))
        return pictures_BJ, self.text_head(self.text_encoder(ids_BT).pooler_output)


class ScorerPair(nn.Module):
    """An ``open_clip.CLIP`` while it is trained: its token embedding is one of R rows.

    Args:
        scorer: changed in place; :meth:`finished` gives it its full token embedding back.
        token_rows: R.
    """

    def __init__(self, scorer: Any, token_rows: int) -> None:
        super().__init__()
        self.scorer = scorer
        rows_VE = scorer.token_embedding.weight.data
        scorer.token_embedding = PeriodicEmbedding(token_rows, rows_VE.shape[1])
        scorer.token_embedding.weight.data.copy_(rows_VE[:token_rows])
        self.reader = JointReader(scorer.text_projection.shape[1])

    @property
    def logit_scale(self) -> Tensor:
        """Return the logarithm of the scale of the similarities."""
        return self.scorer.logit_scale

    def forward(self, pixels_B3SS: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return joint vectors ``[B, J]`` of normalised pictures and of their captions."""
        return self.scorer.encode_image(pixels_B3SS), encode_short_text(self.scorer, ids_BT)

    def finished(self) -> nn.Module:
        """Return the trained CLIP."""
        rows_RE = self.scorer.token_embedding.weight.data
        vocabulary = self.scorer.vocab_size
        full = nn.Embedding(vocabulary, rows_RE.shape[1])
        full.weight.data.copy_(rows_RE[torch.arange(vocabulary) % len(rows_RE)])
        self.scorer.token_embedding = full
        return self.scorer


def encode_short_text(model: Any, ids_BT: Tensor) -> Tensor:
    """Return what ``open_clip.CLIP.encode_text`` returns, for ids without the padding it wants: ``[B, J]``."""
    length = ids_BT.shape[1]
    hidden_BTE = model.token_embedding(ids_BT) + model.positional_embedding[:length]
    hidden_BTE = model.ln_final(model.transformer(hidden_BTE, attn_mask=model.attn_mask[:length, :length]))
    ends_B = ids_BT.argmax(dim=1)
    return hidden_BTE[torch.arange(len(ids_BT), device=ids_BT.device), ends_B] @ model.text_projection


def contrastive_loss(pictures_BJ: Tensor, texts_BJ: Tensor, logit_scale: Tensor) -> Tensor:
    """Return CLIP's symmetric cross-entropy; row i of both belongs together."""
    scale = logit_scale.clamp(max=_LARGEST_LOGIT_SCALE).exp()
    logits_BB = scale * F.normalize(pictures_BJ, dim=1) @ F.normalize(texts_BJ, dim=1).T
    targets_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, targets_B) + F.cross_entropy(logits_BB.T, targets_B)) / 2


def caption_ids(tokenizer: CaptionTokenizer) -> Callable[[list[str]], Tensor]:
    """Return a function from captions to ids for Stable Diffusion's text encoder, padded to the longest.

    Attention is causal: what is cut off behind the last end token changes no pooled state.
    """
    return lambda captions: tokenizer(captions, padding=True, return_tensors="pt")["input_ids"]


def scorer_ids(context_length: int) -> Callable[[list[str]], Tensor]:
    """Return a function from captions to ids for open_clip, padded to the longest."""
    tokenizer = SimpleTokenizer(context_length=context_length)

    def encode(captions: list[str]) -> Tensor:
        ids_BT = tokenizer(captions)
        return ids_BT[:, : int((ids_BT != 0).sum(dim=1).max())]

    return encode


class ContrastiveObjective:
    """Loss of one step.

    Args:
        pair: trained.
        encode: captions → ids.
        pool: pictures; a batch is made of whole groups, so every caption has negatives that differ little.
        recipe: batch size.
    """

    def __init__(
        self,
        pair: VisionTextPair | ScorerPair,
        encode: Callable[[list[str]], Tensor],
        pool: Pool,
        recipe: Recipe,
    ) -> None:
        self.pair, self.encode, self.pool, self.recipe = pair, encode, pool, recipe

    def __call__(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return the contrastive loss; for the scorer its sum with the losses of reading pictures and texts."""
        numbers = self.pool.draw_groups(generator, self.recipe.batch_size)
        pixels_B3SS = normalize(self.pool.pixels(numbers), list(CLIP_MEAN), list(CLIP_STD))
        ids_BT = self.encode(self.pool.captions(numbers, generator))
        device = next(self.pair.parameters()).device
        pictures_BJ, texts_BJ = self.pair(pixels_B3SS.to(device), ids_BT.to(device))
        contrast = contrastive_loss(pictures_BJ, texts_BJ, self.pair.logit_scale)
        if not isinstance(self.pair, ScorerPair):
            return {"loss": contrast}
        scenes = [self.pool.scenes[number] for number in numbers]
        seen, _ = reading_loss(self.pair.reader(pictures_BJ), scenes)
        told, _ = reading_loss(self.pair.reader(texts_BJ), scenes)
        return {"loss": contrast + seen + told, "contrast": contrast, "seen": seen, "told": told}
