"""The networks of one evaluation, and the features of everything it scores.

Shapes: N items, E CLIP width, D FID features, C classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minigpt5.config import MetricsConfig
from minigpt5.devices import open_device
from minigpt5.metrics.clip import QUICK_GELU, Clip, load_clip
from minigpt5.metrics.image import PICTURES_A_BATCH, PictureEncoder, fid_encoder, inception_encoder, read_picture
from minigpt5.metrics.text import SentenceEncoder, load_sentence_encoder

Kind = Literal["clip", "fid", "inception"]
CLIP_TEXT_TOWER = "clip"
"""``metrics.sentence_encoder``: CLIP's own text tower instead of a sentence-transformers model."""


class Networks:
    """The feature networks, each loaded when a suite first needs it.

    Args:
        config: names and files.
        default_clip: open_clip model where the configuration names none.
    """

    def __init__(self, config: MetricsConfig, default_clip: str) -> None:
        self._config = config
        self._default_clip = default_clip
        self.labels: dict[str, str] = {}
        """What was loaded, for the report."""

    @cached_property
    def device(self) -> torch.device:
        """Where the networks run; InputError if this machine has no such device."""
        return open_device(self._config.device, "metrics.device")

    @cached_property
    def clip(self) -> Clip:
        """The CLIP model."""
        name, pretrained = self._config.clip_model or self._default_clip, self._config.clip_pretrained
        if self._config.clip_model is None and Path(pretrained).is_file():
            # The published models are OpenAI's, and a file does not say that it wants their activation.
            name += QUICK_GELU
        clip = load_clip(name, pretrained, self.device)
        self.labels["clip"] = clip.label
        return clip

    @cached_property
    def sentences(self) -> SentenceEncoder:
        """The sentence encoder."""
        name = self._config.sentence_encoder
        encoder = self.clip.texts if name == CLIP_TEXT_TOWER else load_sentence_encoder(name, self.device)
        self.labels["sentence_encoder"] = encoder.label
        return encoder

    @cached_property
    def fid(self) -> PictureEncoder:
        """FID's feature network."""
        encoder = fid_encoder(self._config.fid_network, self.device)
        self.labels["fid"] = encoder.label
        return encoder

    @cached_property
    def inception(self) -> PictureEncoder:
        """The Inception Score's classifier."""
        encoder = inception_encoder(self._config.inception_network, self.device)
        self.labels["inception"] = encoder.label
        return encoder

    def require(self, *names: Literal["clip", "sentences", "fid", "inception"]) -> None:
        """Load networks now, so that one that cannot be had stops the evaluation before the work.

        Raises:
            InputError: a network cannot be had; its setting is named.
        """
        for name in names:
            getattr(self, name)

    def picture_encoder(self, kind: Kind) -> PictureEncoder:
        """Return the encoder of one kind of feature."""
        return {
            "clip": lambda: self.clip.pictures,
            "fid": lambda: self.fid,
            "inception": lambda: self.inception,
        }[kind]()


class PictureFeatures:
    """Feature rows of a store's pictures; each picture is decoded once."""

    def __init__(self) -> None:
        self._rows: dict[tuple[Kind, str], Tensor] = {}

    @classmethod
    def extract(cls, folder: Path, wanted: Mapping[Kind, Iterable[str]], networks: Networks) -> "PictureFeatures":
        """Encode pictures of a prediction store.

        Args:
            folder: the store.
            wanted: kind of feature → picture names relative to ``folder``.
            networks: loaded only for kinds with a picture.

        Raises:
            InputError: a picture is missing or unreadable, or a network cannot be had.
        """
        features = cls()
        kinds: dict[str, list[Kind]] = {}
        for kind, names in wanted.items():
            for name in names:
                if kind not in (asked := kinds.setdefault(name, [])):
                    asked.append(kind)
        names = list(kinds)
        for start in range(0, len(names), PICTURES_A_BATCH):
            pictures = {name: read_picture(folder / name) for name in names[start : start + PICTURES_A_BATCH]}
            for kind in wanted:
                chosen = [name for name in pictures if kind in kinds[name]]
                if chosen:
                    rows_ND = networks.picture_encoder(kind).encode([pictures[name] for name in chosen])
                    features._rows |= {(kind, name): row for name, row in zip(chosen, rows_ND, strict=True)}
        return features

    def row(self, kind: Kind, name: str) -> Tensor:
        """Return one picture's features."""
        return self._rows[kind, name]

    def rows(self, kind: Kind, names: Sequence[str]) -> Tensor:
        """Return ``[N, ·]`` features in the order of ``names``; ``[0, 0]`` for none."""
        if not names:
            return torch.empty(0, 0)
        return torch.stack([self._rows[kind, name] for name in names])
