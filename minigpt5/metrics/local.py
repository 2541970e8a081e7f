"""Small networks from local files, for scoring without the real feature networks.

- A feature network for FID and Inception Score: one safetensors file (:class:`SmallFeatureNetwork`).
- A compact CLIP: a folder with ``config.json`` and ``model.safetensors`` (:func:`load_compact_clip`).

Figures made with them compare runs of the same small world with each other, never with published numbers.
Shapes: B batch, H height, W width, D features, V vocabulary, E width, R stored rows.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minigpt4.errors import InputError

LOCAL_PREFIX = "local "
"""Begins the label of every small network, so a report can say that one was used."""
COMPACT_CONFIG = "config.json"
COMPACT_WEIGHTS = "model.safetensors"
_TOKEN_EMBEDDING = "token_embedding.weight"
_TOKEN_ROWS = "token_embedding_base"
_INPUT_SIDE = 32


class SmallFeatureNetwork(nn.Module):
    """Two convolutions and a linear layer: picture → feature vector or class logits.

    Args:
        num_features: width of the output D (FID features, or classes for the Inception Score).
        width: channels of the first convolution; the second has twice as many.
        grid: side of the last map, so the linear layer sees ``2 · width · grid²`` values.
    """

    def __init__(self, num_features: int, width: int = 8, grid: int = 2) -> None:
        super().__init__()
        self.num_features = num_features
        self.grid = grid
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width * grid * grid, num_features)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Map pixels in [0, 1] of any size (or uint8) to ``[B, D]``."""
        if pixels_B3HW.dtype == torch.uint8:
            pixels_B3HW = pixels_B3HW.float() / 255
        hidden = F.adaptive_avg_pool2d(pixels_B3HW, _INPUT_SIDE)
        hidden = torch.tanh(self.conv2(torch.tanh(self.conv1(hidden))))
        return self.head(F.adaptive_avg_pool2d(hidden, self.grid).flatten(1))


def load_feature_network(path: Path, setting: str) -> SmallFeatureNetwork:
    """Load a :class:`SmallFeatureNetwork`; its sizes are those of the stored tensors.

    Args:
        path: safetensors file with ``conv1``, ``conv2`` and ``head``, each ``weight`` and ``bias``.
        setting: configuration key, named in errors.

    Raises:
        InputError: no such file, or other tensors in it.
    """
    state = _load_tensors(path, setting)
    try:
        features, flat = state["head.weight"].shape
        width = state["conv1.weight"].shape[0]
        network = SmallFeatureNetwork(features, width, grid=round((flat / (2 * width)) ** 0.5))
        network.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{setting}: {path} is no small feature network ({error}); expected conv1, conv2 and head "
            "as described in docs/metrics.md"
        ) from None
    return network.eval()


def load_compact_clip(folder: Path) -> tuple[nn.Module, Callable[..., Tensor], Callable[..., Tensor]]:
    """Load a CLIP folder of ours: ``config.json`` (``model_cfg``, ``preprocess_cfg``) and ``model.safetensors``.

    The weights have open_clip's names. Instead of the token embedding ``[V, E]`` the file may hold
    ``token_embedding_base`` ``[R, E]``: row i of the embedding is then row i mod R.

    Returns:
        The model, its picture transform and its tokenizer.

    Raises:
        InputError: a file is missing or does not fit.
    """
    setting = "metrics.clip_model"
    path = folder / COMPACT_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model = open_clip.CLIP(**config["model_cfg"])
        context_length = config["model_cfg"]["text_cfg"].get("context_length", 77)
        preprocess = merge_preprocess_dict(PreprocessCfg(), config.get("preprocess_cfg", {}))
        transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    except OSError:
        raise InputError(f"{setting}: {path} does not exist; see docs/metrics.md for the folder's files") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{setting}: {path} does not describe a CLIP model: {error!r}") from None
    state = _load_tensors(folder / COMPACT_WEIGHTS, setting)
    if _TOKEN_ROWS in state:
        rows_RE = state.pop(_TOKEN_ROWS)
        vocabulary = config["model_cfg"]["text_cfg"]["vocab_size"]
        state[_TOKEN_EMBEDDING] = rows_RE[torch.arange(vocabulary) % len(rows_RE)]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{setting}: {folder / COMPACT_WEIGHTS} does not fit {path}: {error}") from None
    return model.eval(), transform, open_clip.SimpleTokenizer(context_length=context_length)


def save_compact_clip(
    folder: Path, model: nn.Module, config: Mapping[str, Any], token_rows: int | None = None
) -> None:
    """Write a CLIP folder that :func:`load_compact_clip` reads.

    Args:
        folder: made if missing.
        model: an ``open_clip.CLIP``.
        config: ``model_cfg`` and ``preprocess_cfg``.
        token_rows: R; store only the first R rows of the token embedding, which must repeat with period R.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state.pop("attn_mask", None)
    if token_rows is not None:
        embedding_VE = state.pop(_TOKEN_EMBEDDING)
        rows_RE = embedding_VE[:token_rows].clone()
        if not torch.equal(embedding_VE, rows_RE[torch.arange(len(embedding_VE)) % token_rows]):
            raise ValueError(f"the token embedding does not repeat with period {token_rows}")
        state[_TOKEN_ROWS] = rows_RE
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / COMPACT_WEIGHTS)
    (folder / COMPACT_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _load_tensors(path: Path, setting: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{setting}: {path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{setting}: {path} is no safetensors file: {error}") from None
