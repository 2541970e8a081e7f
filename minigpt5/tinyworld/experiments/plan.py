"""From comparisons to runs: which trainings and predictions a cell needs, and the keys they are found by.

A run's key is a hash of everything its outcome depends on: the resolved configuration, the data's sizes, the
foundation weights, the precision that this machine computes in, and the run it starts from. Cells that share a
training so share its key, and a run whose configuration changed has another one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from minigpt5.config import PROJECT_ROOT, RunConfig, Stage, load_config
from minigpt5.hardware import choose_hardware
from minigpt5.tinyworld.experiments.comparisons import CAPTIONS, STORIES, Comparison, Sizes, Variant
from minigpt5.tinyworld.stories import STORY_LENGTH

TINY = PROJECT_ROOT / "config" / "tiny.yaml"
FORMAT = 3
"""Part of every key and of the data's folder; raised when data, trainings or measures change in a way that no
setting shows."""
DATA_SEED = 0
HELD_OUT_SEED = 1
"""Of the records that are measured on; validation while training sees others."""
_FOLDERS = {CAPTIONS: "CC3M", STORIES: "VIST"}
_FILES = {CAPTIONS: ("cc3m_train.tsv", "cc3m_val.tsv"), STORIES: ("train_cleaned.json", "val_cleaned.json")}
_VALIDATION = {CAPTIONS: 16, STORIES: 4}
_KEY_LENGTH = 16


@dataclass(frozen=True)
class Training:
    """One stage's training run."""

    key: str
    name: str
    config: RunConfig
    checkpoint: Path
    """Written by it."""
    start: "Training | None"


@dataclass(frozen=True)
class Prediction:
    """Replies for the held-out data from one trained model."""

    key: str
    config: RunConfig
    training: Training


@dataclass(frozen=True)
class Cell:
    """One number of a table: a variant trained with one seed."""

    comparison: str
    variant: str
    seed: int
    overrides: Mapping[str, Any]
    prediction: Prediction
    path: Path
    """Its result."""

    @property
    def name(self) -> str:
        """Return what it is called in messages."""
        return f"{self.comparison} / {self.variant} / seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """Return the stored result, or None if there is none that is still valid."""
        if not self.path.is_file():
            return None
        stored: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return stored if stored["key"] == self.prediction.key else None


@dataclass(frozen=True)
class Plan:
    """Where everything is, and how large."""

    folder: Path
    sizes: Sizes

    @property
    def data(self) -> Path:
        """Return the folder of the data of these sizes; ``train`` and ``held_out`` below it."""
        sizes = self.sizes
        return self.folder / "data" / f"{FORMAT}-{sizes.captions}-{sizes.stories}-{sizes.held_out}"

    @cached_property
    def foundations(self) -> dict[Stage, str]:
        """Return a digest of the foundation weights that each stage uses: no picture is looked at in the first."""
        config = load_config(TINY, {}, {})
        drawing = [config.model.backbone.language_model.weights, config.model.diffusion.weights]
        backbone = config.model.backbone
        seeing = [backbone.vision.weights, backbone.qformer.weights, backbone.projection_weights]
        return {Stage.ALIGNMENT: _digest(drawing), Stage.MULTIMODAL: _digest(drawing + seeing)}

    @cached_property
    def precision(self) -> str:
        """Return what ``training.precision: auto`` means on this machine."""
        return choose_hardware(load_config(TINY, {}, {}).training).precision

    def seeds_done(self, comparison: Comparison) -> int:
        """Return how many seeds of a comparison have been measured so far, by whatever call."""
        results = self._cell_folder(comparison).glob("*-seed*.json")
        return 1 + max((int(path.stem.rpartition("-seed")[2]) for path in results), default=-1)

    def cells(self, comparison: Comparison, seeds: int) -> list[Cell]:
        """Return a comparison's cells, one for each variant and seed."""
        return [self._cell(comparison, variant, seed) for variant in comparison.variants for seed in range(seeds)]

    def _cell(self, comparison: Comparison, variant: Variant, seed: int) -> Cell:
        prediction = self._prediction(comparison.data, variant, seed)
        return Cell(
            comparison.name,
            variant.label,
            seed,
            {**variant.both, **variant.stage2, **variant.predicting},
            prediction,
            self._cell_folder(comparison) / f"{_file_name(variant.label)}-seed{seed}.json",
        )

    def _cell_folder(self, comparison: Comparison) -> Path:
        return self.folder / "cells" / comparison.name

    def _prediction(self, data: str, variant: Variant, seed: int) -> Prediction:
        training = self._training(CAPTIONS, variant, seed) if data == CAPTIONS else self._stage2(variant, seed)
        # Of captions only the picture is compared, so nothing but its vokens is decoded.
        decoding: dict[str, Any] = {"generation.images": "force", "generation.max_new_tokens": 1}
        if data == STORIES:
            decoding = {"data.tasks": ("generation", "understanding")}
        config = self._config(
            seed,
            {
                **_stage_overrides(data, variant),
                "data.folder": self.data / "held_out" / _FOLDERS[data],
                "data.test": _FILES[data][1],
                "generation.seed": seed,
                "generation.baseline_images": False,
                "generation.batch_size": 16,
                **decoding,
                **variant.predicting,
                "test_weight": training.checkpoint,
                "stage1_weight": training.start and training.start.checkpoint,
            },
        )
        key = self._key(config, ("model", "generation", "data"), [training.key, self.sizes.held_out])
        outputs = {"paths.outputs": self.folder / "predictions" / key}
        return Prediction(key, _replace(config, outputs), training)

    def _stage2(self, variant: Variant, seed: int) -> Training:
        start = self._training(CAPTIONS, variant, seed) if variant.has_stage1 else None
        return self._training(STORIES, variant, seed, start)

    def _training(self, data: str, variant: Variant, seed: int, start: Training | None = None) -> Training:
        train, validation = _FILES[data]
        steps = self.sizes.steps[0 if data == CAPTIONS else 1]
        if data == STORIES and variant.keeps_total_steps:
            steps = sum(self.sizes.steps)
        second = {
            "training.learning_rate": self.sizes.stage2_rate,
            "loss.text_weight": self.sizes.stage2_text_weight,
        }
        config = self._config(
            seed,
            {
                **(second if data == STORIES else {}),
                **_stage_overrides(data, variant),
                "data.folder": self.data / "train" / _FOLDERS[data],
                "data.train": train,
                "data.validation": validation,
                "training.max_steps": steps,
                "training.num_epochs": steps,
                "training.batch_size": self.sizes.batch_size,
                "training.effective_batch_size": self.sizes.batch_size,
                "training.val_check_interval": 1.0,
                "training.sample_every_steps": 0,
                "training.loggers": (),
                "stage1_weight": start and start.checkpoint,
            },
        )
        parts = ("stage", "model", "loss", "data", "training")
        records = self.sizes.captions if data == CAPTIONS else self.sizes.stories
        key = self._key(config, parts, [start and start.key, records])
        checkpoint = self.folder / "checkpoints" / f"{key}.ckpt"
        config = _replace(config, {"paths.checkpoints": self.folder / "training" / key})
        return Training(
            key, f"stage {1 if data == CAPTIONS else 2}, seed {seed}, {key}", config, checkpoint, start
        )

    def _config(self, seed: int, overrides: Mapping[str, Any]) -> RunConfig:
        shared = {"data.check_images": "none", "data.num_workers": 0, "training.seed": seed}
        paths = {"paths.weights": self.folder / "checkpoints", "paths.bundled_checkpoints": None}
        return load_config(TINY, {**shared, **paths, **overrides}, {})

    def _key(self, config: RunConfig, parts: tuple[str, ...], further: list[Any]) -> str:
        values = TypeAdapter(RunConfig).dump_python(config, mode="json")
        content = {part: values[part] for part in parts}
        # Folders are not what a result depends on; what is in them is.
        content["data"] = {name: value for name, value in values["data"].items() if name != "folder"}
        content["model"] = _without_sources(content["model"])
        known = [
            FORMAT,
            DATA_SEED,
            HELD_OUT_SEED,
            self.foundations[config.stage],
            self.precision,
            content,
            further,
        ]
        return sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:_KEY_LENGTH]


def write_data(plan: Plan) -> None:
    """Write the data that every run reads, unless it is there."""
    from minigpt5.tinyworld import datasets

    sizes = plan.sizes
    done = plan.data / "done"
    if done.is_file():
        return
    held_out = {CAPTIONS: sizes.held_out, STORIES: math.ceil(sizes.held_out / STORY_LENGTH)}
    for name, count in ((CAPTIONS, sizes.captions), (STORIES, sizes.stories)):
        train = datasets.Sizes(count, _VALIDATION[name])
        datasets.write_datasets(plan.data / "train", train, DATA_SEED, (name,))
        datasets.write_datasets(plan.data / "held_out", datasets.Sizes(0, held_out[name]), HELD_OUT_SEED, (name,))
    done.touch()


def _stage_overrides(data: str, variant: Variant) -> dict[str, Any]:
    stage = Stage.ALIGNMENT if data == CAPTIONS else Stage.MULTIMODAL
    return {"stage": stage.value, **variant.both, **(variant.stage2 if data == STORIES else {})}


def _replace(config: RunConfig, paths: Mapping[str, Any]) -> RunConfig:
    """Set folders that depend on the key; they are no part of it."""
    names = {key.removeprefix("paths."): value for key, value in paths.items()}
    return replace(config, paths=replace(config.paths, **names))


def _digest(sources: Sequence[str | None]) -> str:
    """Return a digest of the names and contents of files, and of those in folders."""
    digest = sha256()
    for source in (Path(source) for source in sources if source is not None):
        files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
        for path in files:
            with path.open("rb") as file:
                digest.update(path.name.encode() + file_digest(file, "sha256").digest())
    return digest.hexdigest()[:_KEY_LENGTH]


def _without_sources(values: Any) -> Any:
    """Leave out where weights are; a digest of them stands in the key instead."""
    if not isinstance(values, dict):
        return values
    return {
        name: _without_sources(value)
        for name, value in values.items()
        if name not in ("weights", "projection_weights")
    }


def _file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".+" else "_" for letter in label)
