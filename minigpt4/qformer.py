"""BLIP-2's Q-Former with its learned queries, text branch left out.

Shapes: P pictures, S patches and the class token, D vision width, L queries, Q Q-Former width.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from minigpt4.config import QFormerConfig
from minigpt4.vision import NOT_VISION
from minigpt4.weights import FileKind, KeyReport, folder_tensors, load_state, read_state, resolve_source

FLAG = "model.backbone.qformer.weights"


class QFormer(nn.Module):
    """Patch states → one state a query, by cross-attention in every second layer."""

    def __init__(self, config: QFormerConfig, vision_width: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_queries, config.hidden_size))
        self.model = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                cross_attention_frequency=config.cross_attention_frequency,
                encoder_hidden_size=vision_width,
                layer_norm_eps=1e-12,
            )
        )

    def forward(self, patches_PSD: Tensor) -> Tensor:
        """Return query states ``[P, L, Q]``."""
        queries = self.query_tokens.expand(patches_PSD.shape[0], -1, -1)
        return self.model(query_embeds=queries, encoder_hidden_states=patches_PSD).last_hidden_state


def load_qformer(
    qformer: QFormer, ln_vision: nn.LayerNorm, config: QFormerConfig, dtype: torch.dtype
) -> KeyReport:
    """Load a LAVIS file, which also holds ``ln_vision``, or a Hugging Face BLIP-2 folder.

    A folder's ``ln_vision`` belongs to its vision model and came with that; only where the vision weights are
    LAVIS's, which lack it, is it taken from here.

    Raises:
        InputError: missing file, keys or shapes that do not fit.
    """
    assert config.weights is not None
    source = resolve_source(config.weights, FLAG)
    is_folder = source.is_dir()
    state = dict(folder_tensors(source, FLAG, NOT_VISION)) if is_folder else read_state(source, FLAG)
    target = nn.ModuleDict({"qformer": qformer})
    if not is_folder or ln_vision.weight.is_meta:
        target["ln_vision"] = ln_vision
    return load_state(target, state, _kind(source), str(source), dtype)


def _kind(source: Path) -> FileKind:
    if source.is_dir():
        return FileKind(
            "BLIP-2 Q-Former (Hugging Face)",
            _rename_hugging_face,
            ignored=(r"(vision_model|language_model|language_projection)\..*", r"qformer\.embeddings\..*"),
        )
    return FileKind(
        "BLIP-2 Q-Former (LAVIS)",
        _rename_lavis,
        ignored=(
            # the text branch, the heads of BLIP-2's own training, other projections, a frozen ViT
            r"Qformer\.cls\..*",
            r"Qformer\.bert\.embeddings\.(position_ids|word_embeddings\.weight|position_embeddings\.weight)",
            r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
            r"(t5_proj|opt_proj|llm_proj|vision_proj|text_proj|itm_head|visual_encoder)\..*",
            "temp",
        ),
    )


def _rename_hugging_face(key: str) -> str | None:
    if key == "query_tokens":
        return "qformer.query_tokens"
    if key.startswith("vision_model.post_layernorm."):
        return key.replace("vision_model.post_layernorm", "ln_vision")
    return f"qformer.model.{key.removeprefix('qformer.')}" if key.startswith("qformer.") else None


def _rename_lavis(key: str) -> str | None:
    if key == "query_tokens":
        return "qformer.query_tokens"
    if key.startswith("ln_vision."):
        return key
    if match := re.fullmatch(r"Qformer\.bert\.embeddings\.LayerNorm\.(weight|bias)", key):
        return f"qformer.model.layernorm.{match[1]}"
    if key.startswith("Qformer.bert.encoder."):
        name = key.removeprefix("Qformer.bert.").replace("attention.self.", "attention.attention.")
        return f"qformer.model.{name}"
    return None
