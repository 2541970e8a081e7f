"""Two contrastive pairs: the vision encoder with Stable Diffusion's text encoder, and open_clip's CLIP for scores.

The first pair gives the language side its eyes (EVA-CLIP) and the diffusion model its frozen text encoder; the
second only scores, and shares nothing with the first.
Shapes: B pictures and captions, T tokens, S patches and the class token, D vision width, E text width, J joint.
"""

import math
from collections.abc import Mapping
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

RECIPE = Recipe(steps=4000, batch_size=64, learning_rate=1e-3, warmup_steps=200, weight_decay=0.05)
_FIRST_LOGIT_SCALE = math.log(1 / 0.07)
_LARGEST_LOGIT_SCALE = math.log(100)
"""Both as in CLIP (arXiv 2103.00020, section 2.5)."""


class PeriodicEmbedding(nn.Embedding):
    """A token embedding whose row i is row i mod R: what a compact CLIP stores."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return ``[B, T, E]``."""
        return super().forward(ids_BT % self.num_embeddings)


class ContrastivePairs(nn.Module):
    """What the contrastive part trains.

    Args:
        vision: the backbone's picture encoder.
        text_encoder: Stable Diffusion's text encoder.
        scorer: an ``open_clip.CLIP``, whose token embedding is replaced by one of ``token_rows`` rows.
        token_rows: R.
    """

    def __init__(self, vision: VisionEncoder, text_encoder: CLIPTextModel, scorer: Any, token_rows: int) -> None:
        super().__init__()
        self.vision, self.text_encoder, self.scorer = vision, text_encoder, scorer
        joint = text_encoder.config.projection_dim
        self.vision_head = nn.Linear(vision.model.config.hidden_size, joint, bias=False)
        self.text_head = nn.Linear(text_encoder.config.hidden_size, joint, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(_FIRST_LOGIT_SCALE))
        rows_VE = scorer.token_embedding.weight.data
        scorer.token_embedding = PeriodicEmbedding(token_rows, rows_VE.shape[1])
        scorer.token_embedding.weight.data.copy_(rows_VE[:token_rows])

    def forward(self, pixels_B3SS: Tensor, ids_BT: Tensor, scorer_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return both pairs' contrastive losses for normalised pictures and two tokenizations of the captions."""
        patches_BSD = self.vision(pixels_B3SS)
        pictures_BJ = self.vision_head(patches_BSD.mean(dim=1))
        texts_BJ = self.text_head(self.text_encoder(ids_BT).pooler_output)
        own = contrastive_loss(pictures_BJ, texts_BJ, self.logit_scale)
        scorer_texts_BJ = encode_short_text(self.scorer, scorer_ids_BT)
        scores = contrastive_loss(self.scorer.encode_image(pixels_B3SS), scorer_texts_BJ, self.scorer.logit_scale)
        return own, scores

    def finished_scorer(self) -> nn.Module:
        """Give the scorer its full token embedding back and return it."""
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


class ClipObjective:
    """Loss of one step.

    Args:
        pairs: trained.
        pool: pictures; a batch is made of whole groups, so every caption has negatives one attribute away.
        tokenizer: of Stable Diffusion's text encoder.
        recipe: batch size.
    """

    def __init__(self, pairs: ContrastivePairs, pool: Pool, tokenizer: CaptionTokenizer, recipe: Recipe) -> None:
        self.pairs, self.pool, self.tokenizer, self.recipe = pairs, pool, tokenizer, recipe
        self.scorer_tokenizer = SimpleTokenizer(context_length=pairs.scorer.context_length)

    def __call__(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return each pair's loss and their sum."""
        numbers = self.pool.draw_groups(generator, self.recipe.batch_size)
        captions = self.pool.captions(numbers, generator)
        device = self.pairs.logit_scale.device
        pixels_B3SS = normalize(self.pool.pixels(numbers), list(CLIP_MEAN), list(CLIP_STD)).to(device)
        # Attention is causal: what is cut off behind the last end token changes no pooled state.
        ids_BT = self.tokenizer(captions, padding=True, return_tensors="pt")["input_ids"].to(device)
        scorer_ids_BT = self.scorer_tokenizer(captions)
        longest = int((scorer_ids_BT != 0).sum(dim=1).max())
        own, scores = self.pairs(pixels_B3SS, ids_BT, scorer_ids_BT[:, :longest].to(device))
        return {"loss": own + scores, "own": own, "scorer": scores}
