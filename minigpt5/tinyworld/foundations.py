"""The tiny world's foundation models: sizes, random initialisation, and the folder they are kept in.

The folder has the layouts of the real ones, so the same loaders read both:
``eva_vit.pth``, ``blip2_qformer.pth``, ``minigpt4.pth``, ``llama/``, ``sd/``, ``clip/`` and ``features/``.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import open_clip
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from minigpt4.backbone import LoadedBackbone, load_backbone
from minigpt4.config import BackboneConfig, LanguageModelConfig, QFormerConfig, VisionConfig
from minigpt4.errors import InputError
from minigpt4.qformer import QFormer
from minigpt4.tokenizer import MODEL_FILE, LlamaTokenizer
from minigpt4.vision import VisionEncoder
from minigpt5.config import DiffusionConfig
from minigpt5.diffusion import StableDiffusion, load_diffusion
from minigpt5.metrics.local import SmallFeatureNetwork, save_compact_clip
from minigpt5.tinyworld.captions import SEEN_WORDS
from minigpt5.tinyworld.export import (
    save_diffusion,
    save_language_model,
    save_projection,
    save_qformer,
    save_vision,
)
from minigpt5.tinyworld.renderer import PICTURE_SIZE
from minigpt5.tinyworld.tokenizers import (
    CLIP_LENGTH,
    LANGUAGE_MAX_LENGTH,
    train_clip_tokenizer,
    train_language_tokenizer,
)

EYES_FILES = ("eva_vit.pth", "blip2_qformer.pth", "minigpt4.pth")
"""Of a folder: ViT, Q-Former and projection."""
VISION = VisionConfig(
    image_size=PICTURE_SIZE, patch_size=8, hidden_size=96, intermediate_size=256, num_layers=4, num_heads=4
)
QFORMER = QFormerConfig(hidden_size=96, intermediate_size=192, num_layers=4, num_heads=4, num_queries=SEEN_WORDS)
LANGUAGE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LANGUAGE_MAX_LENGTH,
    "rms_norm_eps": 1e-6,
}
VAE: dict[str, Any] = {
    "block_out_channels": [12, 24, 48, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": PICTURE_SIZE,
    "scaling_factor": 0.3238,
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [64, 96],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "layers_per_block": 1,
    "attention_head_dim": [4, 6],
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CLIP_LENGTH,
    "hidden_act": "gelu",
    "projection_dim": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
"""Stable Diffusion 2.1's token ids too: they are those of its configuration, not of its tokenizer."""
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
CLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 96,
        "quick_gelu": True,
        "vision_cfg": {"image_size": PICTURE_SIZE, "layers": 4, "width": 96, "head_width": 24, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {
        "size": [PICTURE_SIZE, PICTURE_SIZE],
        "mode": "RGB",
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    },
}
CLIP_TOKEN_ROWS = 1159
"""Stored rows of the token embedding: the least number at which no two of the tiny world's tokens share one."""
_KEPT = ("*.pth", *(f"{name}/**/*.{end}" for name in ("llama", "sd", "clip") for end in ("safetensors", "bin")))
_KEPT += ("features/*.safetensors", "pretraining/*")
"""Files of models and of their pretraining."""
FEATURE_WIDTH, FEATURE_GRID, FID_FEATURES, INCEPTION_CLASSES = 16, 4, 64, 64


@dataclass
class Foundations:
    """Every foundation model, as modules."""

    vision: VisionEncoder
    qformer: QFormer
    projection: nn.Linear
    language_model: LlamaForCausalLM
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    scheduler: PNDMScheduler
    clip: nn.Module
    fid: SmallFeatureNetwork
    inception: SmallFeatureNetwork


def build_foundations(language_tokens: int, clip_tokens: int, seed: int) -> Foundations:
    """Build the models with random weights that depend on ``seed`` and on each model's place alone.

    Args:
        language_tokens: size of the language model's vocabulary.
        clip_tokens: size of the diffusion text encoder's vocabulary.
        seed: decides every weight.
    """
    makers: dict[str, Callable[[], Any]] = {
        "vision": lambda: VisionEncoder(VISION),
        "qformer": _make_qformer,
        "projection": lambda: nn.Linear(QFORMER.hidden_size, LANGUAGE["hidden_size"]),
        "language_model": lambda: LlamaForCausalLM(LlamaConfig(**LANGUAGE, vocab_size=language_tokens)),
        "vae": lambda: AutoencoderKL(**VAE),
        "unet": lambda: UNet2DConditionModel(**UNET),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER, vocab_size=clip_tokens)),
        "scheduler": lambda: PNDMScheduler(**SCHEDULER),
        "clip": _make_clip,
        "fid": lambda: SmallFeatureNetwork(FID_FEATURES, FEATURE_WIDTH, FEATURE_GRID),
        "inception": lambda: SmallFeatureNetwork(INCEPTION_CLASSES, FEATURE_WIDTH, FEATURE_GRID),
    }
    return Foundations(**{name: _seeded(make, seed + place) for place, (name, make) in enumerate(makers.items())})


def save_foundations(models: Foundations, folder: Path) -> None:
    """Write every model into ``folder``, whose ``llama/`` and ``sd/tokenizer/`` hold the tokenizers already."""
    save_vision(models.vision, folder / "eva_vit.pth")
    save_qformer(models.qformer, models.vision.model.post_layernorm, folder / "blip2_qformer.pth")
    save_projection(models.projection, folder / "minigpt4.pth")
    save_language_model(models.language_model, folder / "llama")
    save_diffusion(folder / "sd", models.vae, models.unet, models.text_encoder, models.scheduler)
    save_compact_clip(folder / "clip", copy.deepcopy(models.clip).half(), CLIP, CLIP_TOKEN_ROWS)
    (folder / "features").mkdir(exist_ok=True)
    save_file(models.fid.state_dict(), folder / "features" / "fid_features.safetensors")
    save_file(models.inception.state_dict(), folder / "features" / "is_features.safetensors")


def refuse_models(folder: Path) -> None:
    """Raise an :class:`InputError` if a folder holds models already, or what their pretraining left."""
    held = sorted(path for pattern in _KEPT for path in folder.glob(pattern))
    if held:
        raise InputError(f"--out {folder}: holds {held[0].relative_to(folder)} already; give another or remove it")


def write_foundations(folder: Path, seed: int) -> dict[str, int]:
    """Train the tokenizers, initialise every model at random and write all into ``folder``.

    Returns:
        Written file, relative to ``folder`` → its size in bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train_language_tokenizer(folder / "llama", seed)
    clip_tokens = train_clip_tokenizer(folder / "sd" / "tokenizer", seed)
    language_tokens = len(LlamaTokenizer(folder / "llama" / MODEL_FILE))
    save_foundations(build_foundations(language_tokens, clip_tokens, seed), folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _make_qformer() -> QFormer:
    qformer = QFormer(QFORMER, VISION.hidden_size)
    nn.init.normal_(qformer.query_tokens, std=0.02)
    return qformer


def _make_clip() -> nn.Module:
    model = open_clip.CLIP(**CLIP["model_cfg"])
    with torch.no_grad():
        rows = model.token_embedding.weight[:CLIP_TOKEN_ROWS].clone()
        model.token_embedding.weight.copy_(rows[torch.arange(len(model.token_embedding.weight)) % CLIP_TOKEN_ROWS])
    return model


Made = TypeVar("Made")


def _seeded(make: Callable[[], Made], seed: int) -> Made:
    """Call ``make`` under a seed of its own; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def load_folder_diffusion(folder: Path) -> StableDiffusion:
    """Load the folder's Stable Diffusion."""
    return load_diffusion(DiffusionConfig(weights=str(folder / "sd"), image_size=PICTURE_SIZE))[0]


def load_folder_backbone(folder: Path) -> LoadedBackbone:
    """Load the folder's MiniGPT-4."""
    config = BackboneConfig(
        vision=replace(VISION, weights=str(folder / "eva_vit.pth")),
        qformer=replace(QFORMER, weights=str(folder / "blip2_qformer.pth")),
        projection_weights=str(folder / "minigpt4.pth"),
        language_model=LanguageModelConfig(weights=str(folder / "llama")),
    )
    return load_backbone(config)
