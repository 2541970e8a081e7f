"""EVA-CLIP ViT and the layer norm behind it, as BLIP-2 uses them (LAVIS's ``eva_vit`` and ``ln_vision``).

Shapes: P pictures, S patches and the class token, D vision width.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2VisionConfig, Blip2VisionModel

from minigpt4.config import VisionConfig
from minigpt4.errors import InputError
from minigpt4.weights import FileKind, KeyReport, folder_tensors, load_state, read_state, resolve_source

LN_VISION_EPS = 1e-5
"""LAVIS's ``ln_vision`` keeps torch's default, while the ViT's own layer norms use 1e-6."""

FLAG = "model.backbone.vision.weights"
NOT_VISION = ("language_model.", "language_projection.")
"""What a Hugging Face BLIP-2 folder holds besides its vision parts."""

_LAVIS_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_LAVIS_TOP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}


class VisionEncoder(nn.Module):
    """Pictures → patch states behind ``ln_vision``.

    transformers' ``post_layernorm`` plays the part of ``ln_vision``: the same place, with LAVIS's epsilon.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.model = Blip2VisionModel(
            Blip2VisionConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
            )
        )
        self.model.post_layernorm.eps = LN_VISION_EPS

    def hidden_states(self, pixels_P3HW: Tensor) -> Tensor:
        """Return the ViT's own output ``[P, S, D]``, before ``ln_vision``."""
        return self.model.encoder(self.model.embeddings(pixels_P3HW)).last_hidden_state

    def forward(self, pixels_P3HW: Tensor) -> Tensor:
        """Return patch states ``[P, S, D]`` of pictures normalised with CLIP's mean and deviation."""
        return self.model.post_layernorm(self.hidden_states(pixels_P3HW))


def load_vision(encoder: VisionEncoder, config: VisionConfig, dtype: torch.dtype) -> KeyReport:
    """Load a LAVIS file or a Hugging Face BLIP-2 folder; positions are interpolated to the picture size.

    A LAVIS file does not hold ``ln_vision``: that comes with the Q-Former's.

    Raises:
        InputError: missing file, keys or shapes that do not fit.
    """
    assert config.weights is not None
    source = resolve_source(config.weights, FLAG)
    state = dict(folder_tensors(source, FLAG, NOT_VISION)) if source.is_dir() else read_state(source, FLAG)
    if source.is_dir() or any(key.startswith("vision_model.") for key in state):
        kind = _hugging_face_kind()
    else:
        state = _merge_attention_bias(state, source)
        kind = _lavis_kind(config.num_layers)
    grid = config.image_size // config.patch_size
    notes = []
    for key in list(state):
        if kind.rename(key) == "embeddings.position_embedding":
            resized = interpolate_positions(state[key], grid)
            if resized.shape != state[key].shape:
                notes.append(f"positions interpolated to {grid}x{grid}")
            state[key] = resized
    report = load_state(encoder.model, state, kind, str(source), dtype)
    report.notes.extend(notes)
    return report


def interpolate_positions(positions_1SD: Tensor, grid: int) -> Tensor:
    """Resize a square grid of position embeddings bicubically; the class token's stays (LAVIS, ViT)."""
    old = round((positions_1SD.shape[1] - 1) ** 0.5)
    if old == grid:
        return positions_1SD
    cls, patches = positions_1SD[:, :1], positions_1SD[:, 1:]
    square = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, square.permute(0, 2, 3, 1).flatten(1, 2).to(cls.dtype)], dim=1)


def _merge_attention_bias(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Join EVA's query and value biases into one: its keys have none."""
    merged = dict(state)
    for key in state:
        match = re.fullmatch(r"(.*attn\.)q_bias", key)
        if match is None:
            continue
        value_key = f"{match[1]}v_bias"
        if value_key not in state:
            raise InputError(f"{FLAG}: {path}: has {key} but not {value_key}")
        query, value = merged.pop(key), merged.pop(value_key)
        merged[f"{match[1]}qkv.bias"] = torch.cat([query, torch.zeros_like(value), value])
    return merged


def _lavis_kind(num_layers: int) -> FileKind:
    def rename(key: str) -> str | None:
        key = key.removeprefix("visual_encoder.")
        if key in _LAVIS_TOP:
            return _LAVIS_TOP[key]
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None or int(match[1]) >= num_layers or match[2] not in _LAVIS_NAMES:
            return None
        return f"encoder.layers.{match[1]}.{_LAVIS_NAMES[match[2]]}.{match[3]}"

    return FileKind(
        "EVA-CLIP ViT (LAVIS)",
        rename,
        # BLIP-2 drops the last block of the 40, the final norm and the classifier.
        ignored=(
            rf"(visual_encoder\.)?blocks\.{num_layers}\..*",
            r"(visual_encoder\.)?(norm|fc_norm|head)\..*",
        ),
        absent=(r"post_layernorm\.(weight|bias)",),
    )


def _hugging_face_kind() -> FileKind:
    def rename(key: str) -> str | None:
        return key.removeprefix("vision_model.") if key.startswith("vision_model.") else None

    return FileKind(
        "BLIP-2 vision model (Hugging Face)",
        rename,
        ignored=(r"(qformer|language_model|language_projection)\..*", "query_tokens"),
    )
