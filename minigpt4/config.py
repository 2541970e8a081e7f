"""Sizes and weight sources of the MiniGPT-4 backbone."""

from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class VisionConfig:
    """EVA-CLIP ViT and the layer norm behind it (defaults: ViT-g/14 at 224 px, BLIP-2's encoder)."""

    weights: str | None = None
    """LAVIS file (``eva_vit_g.pth``), Hugging Face BLIP-2 folder or hub id; None leaves random weights."""
    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_layers: int = 39
    num_heads: int = 16


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class QFormerConfig:
    """BLIP-2 Q-Former without its text branch, with its learned queries."""

    weights: str | None = None
    """LAVIS file (``blip2_pretrained_flant5xxl.pth``), Hugging Face BLIP-2 folder or hub id."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    num_queries: int = 32
    cross_attention_frequency: int = 2


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LanguageModelConfig:
    """LLaMA-family language model."""

    weights: str | None = None
    """Hugging Face folder or hub id (Vicuna-7B v0); None leaves random weights."""
    architecture: dict[str, Any] | None = None
    """``transformers.LlamaConfig`` arguments. Needed without weights; with weights each must agree."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """How bitsandbytes stores the layers' matrices: as in the file, as int8 or as NF4. For smaller cards; the
    states are no longer exactly the published ones."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BackboneConfig:
    """The frozen MiniGPT-4: pictures → ViT → Q-Former → projection → language model."""

    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig()
    projection_weights: str | None = None
    """MiniGPT-4's aligned projection (``prerained_minigpt4_7b.pth``)."""
    language_model: LanguageModelConfig = LanguageModelConfig()
