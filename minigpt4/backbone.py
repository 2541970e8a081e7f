"""The frozen MiniGPT-4: pictures → ViT → Q-Former → projection → language-model width.

Shapes: P pictures, L queries a picture, H language width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from minigpt4.config import BackboneConfig
from minigpt4.language_model import build_language_model, load_language_model
from minigpt4.qformer import QFormer, load_qformer
from minigpt4.tokenizer import LlamaTokenizer
from minigpt4.vision import VisionEncoder, load_vision
from minigpt4.weights import FileKind, KeyReport, load_state, read_state

PROJECTION_FLAG = "model.backbone.projection_weights"

_PROJECTION = FileKind(
    "MiniGPT-4 projection",
    lambda key: key.removeprefix("llama_proj.") if key.startswith("llama_proj.") else None,
)


class MiniGPT4(nn.Module):
    """Vision encoder, Q-Former, projection and language model, all frozen and always in eval mode.

    Built with random weights from the configuration's sizes; :func:`load_backbone` loads the published ones.
    """

    def __init__(self, config: BackboneConfig, language_model: LlamaForCausalLM | None = None) -> None:
        super().__init__()
        self.vision = VisionEncoder(config.vision)
        self.qformer = QFormer(config.qformer, config.vision.hidden_size)
        self.language_model = language_model or build_language_model(config.language_model)
        self.projection = nn.Linear(config.qformer.hidden_size, self.language_model.config.hidden_size)
        self.requires_grad_(False)
        self.train(False)

    @property
    def embedding_VH(self) -> Tensor:
        """The language model's input embedding."""
        return cast(Tensor, self.language_model.get_input_embeddings().weight)

    @property
    def head_VH(self) -> Tensor:
        """The language model's output matrix."""
        return cast(Tensor, self.language_model.get_output_embeddings().weight)

    @torch.no_grad()
    def encode_images(self, pixels_P3HW: Tensor) -> Tensor:
        """Return what stands for each picture in the prompt: ``[P, L, H]`` (MiniGPT-4, section 3)."""
        return self.projection(self.qformer(self.vision(pixels_P3HW)))

    def train(self, mode: bool = True) -> "MiniGPT4":
        """Stay in eval mode: frozen parts have no dropout, whatever the model around them does."""
        return super().train(False)


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone with its tokenizer and what became of every weight file's keys."""

    model: MiniGPT4
    tokenizer: LlamaTokenizer
    reports: list[KeyReport]


def load_backbone(
    config: BackboneConfig, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> LoadedBackbone:
    """Load the published files into a backbone.

    Parts are built without storage first, so loading holds no second copy. A part whose weights are None keeps
    random weights; the language model's folder is required, because the tokenizer comes with it.

    Args:
        config: sizes and weight sources.
        dtype: of everything that is not quantized.
        device: where the language model is made (default: the CPU); everything else is loaded to the CPU.

    Raises:
        InputError: a file is missing or does not fit.
    """
    language_model, tokenizer, report = load_language_model(config.language_model, dtype, device)
    reports = [report]
    with torch.device("meta"):
        model = MiniGPT4(config, language_model)
    if config.vision.weights is not None:
        reports.append(load_vision(model.vision, config.vision, dtype))
    if config.qformer.weights is not None:
        ln_vision = model.vision.model.post_layernorm
        reports.append(load_qformer(model.qformer, ln_vision, config.qformer, dtype))
    if config.projection_weights is not None:
        path = Path(config.projection_weights)
        state = read_state(path, PROJECTION_FLAG)
        reports.append(load_state(model.projection, state, _PROJECTION, str(path), dtype))
    _fill_random(model, config, dtype)
    model.requires_grad_(False)
    return LoadedBackbone(model, tokenizer, reports)


def _fill_random(model: MiniGPT4, config: BackboneConfig, dtype: torch.dtype) -> None:
    """Give random weights to the parts that no file was configured for, and to no other."""
    without_file = {
        "vision.": config.vision.weights is None,
        "qformer.": config.qformer.weights is None,
        "projection.": config.projection_weights is None,
    }
    # the language model came whole, wherever it was made
    unloaded = [
        key for key, value in model.state_dict().items() if value.is_meta and not key.startswith("language_model.")
    ]
    allowed = tuple(part for part, is_random in without_file.items() if is_random)
    left = [key for key in unloaded if not key.startswith(allowed)]
    # a LAVIS ViT has its ln_vision from the Q-Former's file, which may be the one that is not configured
    left = [key for key in left if not (without_file["qformer."] and "post_layernorm" in key)]
    assert not left, f"loaded files left {left} empty"
    if unloaded:
        random = MiniGPT4(config, model.language_model).state_dict()
        for key in unloaded:
            if random[key].is_floating_point():
                random[key] = random[key].to(dtype)
        model.load_state_dict({key: random[key] for key in unloaded}, strict=False, assign=True)
