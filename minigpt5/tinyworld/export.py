"""Write models in the published file layouts: the way back from what ``minigpt4`` and ``minigpt5`` load."""

import copy
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, PNDMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from minigpt4.qformer import QFormer
from minigpt4.vision import VisionEncoder

_EVA_TOP = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
}
_EVA_BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def save_vision(encoder: VisionEncoder, path: Path) -> None:
    """Write a ViT as EVA-CLIP's file has it: half precision, one block more than is used, norm and classifier.

    EVA has no key bias. Dropping ours changes nothing: it adds the same to every score of a query.
    """
    state: dict[str, Tensor] = {}
    last = 0
    for key, tensor in encoder.model.state_dict().items():
        if key in _EVA_TOP:
            state[_EVA_TOP[key]] = tensor
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key):
            prefix, last = f"blocks.{match[1]}.", max(last, int(match[1]))
            if match[2] == "self_attn.qkv" and match[3] == "bias":
                query, _, value = tensor.chunk(3)
                state[f"{prefix}attn.q_bias"], state[f"{prefix}attn.v_bias"] = query, value
            else:
                state[f"{prefix}{_EVA_BLOCK[match[2]]}.{match[3]}"] = tensor
    width = state["cls_token"].shape[-1]
    for key in [key for key in state if key.startswith(f"blocks.{last}.")]:
        state[key.replace(f"blocks.{last}.", f"blocks.{last + 1}.")] = torch.zeros_like(state[key])
    state |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    state |= {"head.weight": torch.zeros(1, width), "head.bias": torch.zeros(1)}
    _save({key: tensor.detach().half().clone() for key, tensor in state.items()}, path)


def save_qformer(qformer: QFormer, ln_vision: nn.LayerNorm, path: Path) -> None:
    """Write a Q-Former and ``ln_vision`` as BLIP-2's file has them, in half precision, without text branch."""
    state = {"query_tokens": qformer.query_tokens.data}
    for key, tensor in qformer.model.state_dict().items():
        name = key.replace("layernorm.", "embeddings.LayerNorm.", 1) if key.startswith("layernorm.") else key
        state[f"Qformer.bert.{name.replace('attention.attention.', 'attention.self.')}"] = tensor
    state |= {"ln_vision.weight": ln_vision.weight.data, "ln_vision.bias": ln_vision.bias.data}
    _save({"model": {key: tensor.detach().half().clone() for key, tensor in state.items()}}, path)


def save_projection(projection: nn.Linear, path: Path) -> None:
    """Write MiniGPT-4's projection as its checkpoint has it."""
    state = {f"llama_proj.{key}": tensor.detach().clone() for key, tensor in projection.state_dict().items()}
    _save({"model": state}, path)


def _save(content: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all: others may be reading it, and a killed run goes on from it."""
    temporary = path.with_suffix(".new")
    torch.save(content, temporary)
    temporary.replace(path)


def save_language_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a Hugging Face LLaMA folder in half precision, beside the tokenizer that is there."""
    save_half(model, folder)


def save_diffusion(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scheduler: PNDMScheduler,
) -> None:
    """Write a Stable Diffusion folder in half precision, beside the tokenizer that is there."""
    save_half(vae, folder / "vae")
    save_half(unet, folder / "unet")
    save_half(text_encoder, folder / "text_encoder")
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_half(model: PreTrainedModel | ModelMixin, folder: Path) -> None:
    """Write one model's configuration and half-precision weights into its folder, where others may be reading."""
    transformers_logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as new:
        copy.deepcopy(model).half().save_pretrained(new)
        for file in Path(new).iterdir():
            file.replace(folder / file.name)
