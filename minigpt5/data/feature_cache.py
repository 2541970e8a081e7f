"""Precomputed features instead of pictures, in the published layout.

``<folder>/<train|val>/<picture name>_output.pt`` holds the VAE moments ``[2C, h, w]`` of a wanted picture,
``…_input.pt`` the projected Q-Former output ``[L, H]`` of an input picture; ``.safetensors`` is read too.
``manifest.json`` says which transform the features were made with. Published folders have none.
"""

import json
import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from minigpt4.errors import InputError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SPLITS = ("train", "val")
Kind = Literal["input", "output"]
TENSOR = "feature"
"""Name of the tensor in a ``.safetensors`` file."""


def check_feature_folder(root: Path) -> None:
    """Raise an :class:`InputError` if there is no such folder."""
    if not root.is_dir():
        raise InputError(f"{root}: no such feature folder (PREPROCESS_FEATURE_FOLDER, data.feature_folder)")


class FeatureFolder:
    """A folder of precomputed features.

    Args:
        root: ``PREPROCESS_FEATURE_FOLDER``.
        transform: key of the transform that wanted pictures would go through.

    Raises:
        InputError: no such folder, or its manifest names another transform.
    """

    def __init__(self, root: Path, transform: str) -> None:
        check_feature_folder(root)
        self.root = root
        manifest = read_manifest(root)
        if manifest is None:
            logger.warning(
                "%s has no %s: features are taken as they are. Those of the published preprocessing were "
                "computed from pictures in [0, 1] instead of [-1, 1].",
                root,
                MANIFEST,
            )
        elif manifest.get("transform") != transform:
            raise InputError(
                f"{root / MANIFEST}: features of another transform ({manifest.get('transform')}); this run needs "
                f"{transform}. Recompute them with `python -m minigpt5.data.prepare features`"
            )

    def load(self, kind: Kind, picture: Path) -> torch.Tensor:
        """Return a wanted picture's VAE moments ``[2C, h, w]`` or an input picture's projection ``[L, H]``.

        Raises:
            InputError: there is no such feature file, or it is damaged.
        """
        path = self._find(kind, picture)
        if path is None:
            raise InputError(str(self.fault(kind, picture)))
        return load_feature(path)

    def fault(self, kind: Kind, picture: Path) -> str | None:
        """Return why a picture has no feature, or None."""
        split = split_of(picture)
        if split is None:
            return f"{picture}: no folder of its path begins with train or val, so it has no feature file"
        if self._find(kind, picture) is None:
            return f"{feature_path(self.root, split, kind, picture)}: no such feature file"
        return None

    def _find(self, kind: Kind, picture: Path) -> Path | None:
        split = split_of(picture)
        if split is None:
            return None
        path = feature_path(self.root, split, kind, picture)
        return next((found for found in (path, path.with_suffix(".safetensors")) if found.is_file()), None)


def feature_path(root: Path, split: str, kind: Kind, picture: Path) -> Path:
    """Return where a picture's feature lies, as published."""
    return root / split / f"{picture.stem}_{kind}.pt"


def split_of(picture: Path) -> str | None:
    """Return ``train`` or ``val``: the nearest folder of the path whose name begins so."""
    for folder in picture.parents:
        for split in SPLITS:
            if folder.name.startswith(split):
                return split
    return None


def load_feature(path: Path) -> torch.Tensor:
    """Return the one tensor of a feature file; nothing but tensors is unpickled.

    Raises:
        InputError: the file holds something else or is damaged.
    """
    try:
        if path.suffix == ".safetensors":
            value = load_file(path)[TENSOR]
        else:
            value = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, KeyError, UnpicklingError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a feature file ({reason}); prepare it again") from None
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{path}: one tensor wanted, found {type(value).__name__}")
    return value


def read_manifest(root: Path) -> dict[str, object] | None:
    """Return the manifest of a feature folder, or None if it has none.

    Raises:
        InputError: it is not a JSON object.
    """
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a JSON object wanted")
    return values
