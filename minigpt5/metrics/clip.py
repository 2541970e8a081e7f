"""CLIP similarities between pictures and texts, through open_clip.

Shapes: N items, E embedding width.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt4.errors import InputError
from minigpt5.metrics.hub import cached_without_network
from minigpt5.metrics.image import PictureEncoder
from minigpt5.metrics.local import COMPACT_CONFIG, LOCAL_PREFIX, load_compact_clip
from minigpt5.metrics.text import SentenceEncoder

_TEXTS_A_BATCH = 64
_OPEN_CLIP_CONFIG = "open_clip_config.json"
QUICK_GELU = "-quickgelu"


@dataclass(frozen=True)
class Clip:
    """One CLIP model: unit vectors of pictures and of texts in a common space."""

    label: str
    pictures: PictureEncoder
    texts: SentenceEncoder


def load_clip(name: str, pretrained: str, device: torch.device) -> Clip:
    """Load a CLIP model.

    Args:
        name: open_clip model name; a folder of open_clip (``open_clip_config.json``); or a compact CLIP folder.
        pretrained: open_clip tag or weights file; not used for a folder.
        device: where it runs.

    Raises:
        InputError: an unknown name, a folder without a model, or weights that cannot be had.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / _OPEN_CLIP_CONFIG).is_file():
        if not (folder / COMPACT_CONFIG).is_file():
            raise InputError(
                f"metrics.clip_model: {folder} holds neither {_OPEN_CLIP_CONFIG} nor {COMPACT_CONFIG}"
            )
        model, transform, tokenizer = load_compact_clip(folder)
        return wrap_clip(model, transform, tokenizer, device, label=f"{LOCAL_PREFIX}CLIP {folder}")
    if folder.is_dir():
        resolved, tag, label = f"local-dir:{folder.resolve()}", None, f"open_clip folder {folder}"
    else:
        resolved, tag = resolve_name(name, pretrained), pretrained
        label = f"open_clip {resolved} ({pretrained})"
    try:
        with cached_without_network(name):
            model, transform = open_clip.create_model_from_pretrained(resolved, pretrained=tag, device="cpu")
            tokenizer = open_clip.get_tokenizer(resolved)
    except Exception as error:  # open_clip, the hub and the network each raise their own
        raise InputError(
            f"metrics.clip_model: cannot load {label}: {error}; give a folder with the model, or its weights file "
            "as metrics.clip_pretrained"
        ) from error
    return wrap_clip(model, transform, tokenizer, device, label)


def resolve_name(name: str, pretrained: str) -> str:
    """Return the model name whose activation fits the weights.

    OpenAI's weights were trained with QuickGELU; open_clip's plain ``ViT-L-14`` has GELU and would score them
    wrongly, so its ``-quickgelu`` twin is taken wherever the tag asks for it. A weights file has no tag: name
    the twin yourself.

    Raises:
        InputError: open_clip has no such model, or the model no such tag.
    """
    known = open_clip.list_models()
    if name not in known:
        raise InputError(f"metrics.clip_model: {name!r} is neither a folder nor an open_clip model name")
    twin = name + QUICK_GELU
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        if Path(pretrained).is_file():
            return name
        raise InputError(
            f"metrics.clip_pretrained: {pretrained!r} is neither a file nor a tag of {name}; "
            f"tags: {', '.join(tags) or 'none'}"
        )
    wants_quick_gelu = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
    return twin if wants_quick_gelu and twin in known else name


def wrap_clip(
    model: nn.Module,
    transform: Callable[..., Tensor],
    tokenizer: Callable[..., Tensor],
    device: torch.device,
    label: str,
) -> Clip:
    """Return a model as a :class:`Clip`, on ``device`` and in eval mode.

    Args:
        model: has ``encode_image`` and ``encode_text``.
        transform: a picture → its pixels.
        tokenizer: texts → their ids.
        device: where it runs.
        label: what to call it in the report.
    """
    model = model.to(device).eval()
    logging.getLogger(__name__).info("CLIP: %s", label)

    def encode_pictures(pixels_N3HW: Tensor) -> Tensor:
        return F.normalize(model.encode_image(pixels_N3HW).float(), dim=-1)  # type: ignore[operator]

    @torch.inference_mode()
    def encode_texts(texts: Sequence[str]) -> Tensor:
        batches = [texts[start : start + _TEXTS_A_BATCH] for start in range(0, len(texts), _TEXTS_A_BATCH)]
        rows = [model.encode_text(tokenizer(list(batch)).to(device)) for batch in batches]  # type: ignore[operator]
        return F.normalize(torch.cat(rows).float(), dim=-1).cpu()

    return Clip(
        label=label,
        pictures=PictureEncoder(label, transform, encode_pictures, device),
        texts=SentenceEncoder(f"text tower of {label}", encode_texts),
    )
