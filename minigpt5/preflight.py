"""Everything that can be known to be missing before a run starts, gathered into one error."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from minigpt4.errors import InputError
from minigpt4.language_model import check_quantization
from minigpt4.weights import resolve_source
from minigpt5.checkpoint import find_checkpoint
from minigpt5.compilation import cpp_compiler
from minigpt5.config import DataConfig, DatasetName, RunConfig, Stage
from minigpt5.data.feature_cache import check_feature_folder
from minigpt5.data.module import FLAGS
from minigpt5.data.readers import check_records, detect_dataset
from minigpt5.data.types import Split
from minigpt5.strategies import check_strategy
from minigpt5.vokens import voken_text


def check_run(config: RunConfig) -> None:
    """Check that a training or prediction run has its flags and files.

    Raises:
        InputError: one message that lists every problem with its flag or key.
    """
    _raise_for([*_problems(config), *_missing_files(config)])


def check_model(config: RunConfig) -> None:
    """Check that a model that is to generate has its flags and files.

    Raises:
        InputError: as :func:`check_run`.
    """
    _raise_for([*_missing_test_weight(config), *_missing_files(config)])


def check_settings(config: RunConfig) -> None:
    """Check that no two settings rule each other out, whether the run trains or generates; no file is looked at.

    Raises:
        InputError: as :func:`check_run`.
    """
    _raise_for([*_training_clashes(config), *_generation_clashes(config), *_attempt(check_strategy, config)])


def _raise_for(problems: list[str]) -> None:
    problems = list(dict.fromkeys(problems))  # a file may serve two splits
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise InputError(f"{len(problems)} problems with this run:\n{listed}")


def _problems(config: RunConfig) -> Iterator[str]:
    if config.is_training:
        yield from _unusable_data(config, Split.TRAIN, config.data.train)
        yield from _unusable_data(config, Split.VALIDATION, config.data.validation)
        yield from _training_clashes(config)
    elif config.test_weight is None and config.data.test is None:
        yield (
            "nothing to do: give --is_training True to train, or --test_weight and --test_data_path to generate"
        )
    else:
        yield from _missing_test_weight(config)
        yield from _unusable_data(config, Split.TEST, config.data.test)


def _training_clashes(config: RunConfig) -> Iterator[str]:
    if config.is_training and config.model.diffusion.offload:
        yield (
            "model.diffusion.offload: for generating alone, as every training step needs the UNet; leave it off, "
            "and see training.gradient_checkpointing"
        )
    has_prefix = config.stage is Stage.MULTIMODAL and config.model.adapter.kind == "prefix"
    if has_prefix and config.training.gradient_checkpointing:
        yield (
            "training.gradient_checkpointing: not with model.adapter.kind: prefix, whose keys and values the "
            "recomputed layers would not see; switch one of them off"
        )


def _generation_clashes(config: RunConfig) -> Iterator[str]:
    if config.generation.compile and config.model.backbone.language_model.quantization == "8bit":
        yield "generation.compile: not with quantization: 8bit, which cannot be one graph; leave one of them off"


def _missing_test_weight(config: RunConfig) -> Iterator[str]:
    if config.test_weight is None:
        yield "--test_weight: give the checkpoint to generate with"


def _missing_files(config: RunConfig) -> Iterator[str]:
    yield from _missing_checkpoints(config)
    yield from _missing_weights(config)
    yield from _attempt(check_quantization, config.model.backbone.language_model)
    yield from _generation_clashes(config)
    compiles = {
        "training.compile": config.training.compile and config.is_training,
        "generation.compile": config.generation.compile,
    }
    for key in (key for key, wanted in compiles.items() if wanted and cpp_compiler() is None):
        yield (
            f"{key}: torch.compile needs a C++ compiler and finds none (g++ or clang++, or CXX's); install one, "
            "or leave it off"
        )


def _unusable_data(config: RunConfig, split: Split, name: Path | None) -> Iterator[str]:
    if name is None:
        what = "training" if split is Split.TRAIN else split.value
        yield f"{FLAGS[split]}: give the {what} data file (below DATAFOLDER, now {config.data.folder})"
    elif not (config.data.folder / name).is_file():
        yield f"{FLAGS[split]}: {config.data.folder / name}: no such file (DATAFOLDER is {config.data.folder})"
    else:
        vokens = voken_text(config.model.vokens.count)
        yield from _attempt(partial(check_records, voken_text=vokens), config.data, name, split)
        yield from _attempt(_check_features, config.data, name, split)


def _check_features(data: DataConfig, name: Path, split: Split) -> None:
    if data.feature_folder is None or split is Split.TEST:
        return
    dataset = detect_dataset(data.folder / name) if data.dataset is DatasetName.AUTO else data.dataset
    if dataset is DatasetName.CC3M:
        check_feature_folder(data.feature_folder)
    elif split is Split.TRAIN:
        notice = (
            f"notice: PREPROCESS_FEATURE_FOLDER (data.feature_folder) is for CC3M; {dataset.value} is not trained"
        )
        print(f"{notice} on what {data.feature_folder} holds", file=sys.stderr)


def _missing_checkpoints(config: RunConfig) -> Iterator[str]:
    needs_stage1 = config.stage is Stage.MULTIMODAL and config.model.mapper.stage2_trains == "published"
    if needs_stage1 and config.stage1_weight is None:
        yield (
            "--stage1_weight: stage 2 (IS_STAGE2=True) starts from a stage 1 checkpoint; give it, or train the "
            "whole mapper in stage 2 alone (--set model.mapper.stage2_trains=whole)"
        )
    named = {"--stage1_weight": config.stage1_weight if config.stage is Stage.MULTIMODAL else None}
    if config.is_training:
        named["--resume"] = config.resume
    else:
        named["--test_weight"] = config.test_weight
    for flag, name in named.items():
        if name is not None:
            yield from _attempt(find_checkpoint, name, config.paths, flag)


def _missing_weights(config: RunConfig) -> Iterator[str]:
    backbone = config.model.backbone
    sources = {
        "model.backbone.vision.weights": backbone.vision.weights,
        "model.backbone.qformer.weights": backbone.qformer.weights,
        "model.backbone.projection_weights": backbone.projection_weights,
        "model.backbone.language_model.weights": backbone.language_model.weights,
        "model.diffusion.weights": config.model.diffusion.weights,
    }
    for key, source in sources.items():
        if source is not None and is_local(source):
            yield from _attempt(resolve_source, source, key)


def is_local(source: str) -> bool:
    """Whether a weight source can only be a path, not a hub id (``owner/name``) or an address."""
    path = Path(source)
    return "://" not in source and (source.startswith(".") or bool(path.suffix) or len(path.parts) != 2)


def _attempt(look: Callable[..., object], *arguments: object) -> Iterator[str]:
    try:
        look(*arguments)
    except InputError as error:
        yield str(error)
