"""Checkpoints of the trainable parts: finding, reading, loading and converting them.

Two layouts are read: the published one and ours, which holds the trainable parameters under the model's own names,
either in the ``state_dict`` of a Lightning checkpoint or as a folder of ``trainable.safetensors`` and
``checkpoint.json``. Stage-2 weights are loaded on top of stage-1 weights. Where a published file holds the
language model's own rows, they are restored whole: the published training drifted them.
"""

import json
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from minigpt5.checkpoint_command import main
from minigpt5.cli import run_command

if __name__ == "__main__":
    # Before the imports below: they take seconds, which --help need not wait for.
    sys.exit(run_command(main))

import torch
from safetensors.torch import save_file
from torch import Tensor

from minigpt4.errors import InputError
from minigpt4.language_model import load_tokenizer
from minigpt4.tokenizer import MODEL_FILE
from minigpt4.weights import (
    KeyReport,
    State,
    folder_tensors,
    raise_for_keys,
    raise_for_values,
    read_state,
    read_torch_file,
)
from minigpt5.checkpoint_layouts import (
    BASE,
    Checkpoint,
    check_voken_count,
    from_published,
    published_stage,
    to_published,
)
from minigpt5.config import PROJECT_ROOT, PathsConfig, Stage
from minigpt5.model import MiniGPT5

TENSOR_FILE = "trainable.safetensors"
META_FILE = "checkpoint.json"
FORMAT_KEY = "minigpt5"
"""Top-level entry that marks a Lightning checkpoint as ours and names its stage."""
_SETTINGS = {
    "lora_": "model.adapter.kind: lora",
    "prefix.": "model.adapter.kind: prefix",
    "mapper.transformer.": "model.mapper.kind: transformer",
    "mapper.positions.": "model.mapper.kind: mlp",
    "mapper.mlp.": "model.mapper.stage2_trains: whole",
}
"""Part of a parameter's name → the setting it comes with."""


# ---- finding and reading ----------------------------------------------------------------------------------


def find_checkpoint(name: Path, paths: PathsConfig, flag: str) -> Path:
    """Return where a checkpoint is: weights folder, as given, below the project's root, bundled with the preset.

    Raises:
        InputError: none of these; the message lists the places.
    """
    candidates = [paths.weights / name, name, PROJECT_ROOT / paths.weights / name, PROJECT_ROOT / name]
    bundled = None if paths.bundled_checkpoints is None else paths.bundled_checkpoints / name.name
    for candidate in candidates:
        if candidate.exists():
            return candidate
    if bundled is not None and bundled.exists():
        return bundled
    places = ", ".join(
        dict.fromkeys(str(candidate.parent) for candidate in [*candidates, *filter(None, [bundled])])
    )
    raise InputError(f"{flag} {name}: no such checkpoint (looked in {places}); train it or download it there")


def read_checkpoint(path: Path, new_tokens: int, flag: str = "checkpoint") -> Checkpoint:
    """Read a checkpoint of either layout and stage.

    Args:
        path: Lightning file, or a folder in our layout.
        new_tokens: rows that the vokens and the picture placeholder add, to cut whole matrices.
        flag: named in messages.

    Raises:
        InputError: missing, unreadable, or no MiniGPT-5 checkpoint.
    """
    if path.is_dir():
        return _read_folder(path, flag)
    if path.suffix == ".safetensors" and (path.parent / META_FILE).is_file():
        raise InputError(f"{flag}: {path}: is part of a checkpoint folder; give the folder {path.parent}")
    state = read_state(path, flag)
    content = read_torch_file(path, flag)
    meta = {key: value for key, value in content.items() if key != "state_dict"}
    if FORMAT_KEY in content:
        return Checkpoint(str(path), Stage(content[FORMAT_KEY]["stage"]), "ours", state, meta)
    stage = published_stage(state, path, flag)
    return Checkpoint(str(path), stage, "published", from_published(state, stage, new_tokens, path), meta)


def _read_folder(folder: Path, flag: str) -> Checkpoint:
    if not (folder / META_FILE).is_file():
        raise InputError(f"{flag}: {folder}: has no {META_FILE}; give a checkpoint file or a converted folder")
    meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    tensors = read_state(folder / TENSOR_FILE, flag)
    return Checkpoint(str(folder), Stage(meta["stage"]), "ours", tensors, meta.get("meta", {}))


# ---- model -------------------------------------------------------------------------------------------------


def trainable_state(model: MiniGPT5) -> State:
    """Return the trainable parameters under the model's own names, detached."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def checkpoint_mark(stage: Stage, stage1: str | None = None) -> dict[str, Any]:
    """Return the entry that marks a Lightning checkpoint as ours (under :data:`FORMAT_KEY`).

    Args:
        stage: it belongs to.
        stage1: of a stage-2 checkpoint: :func:`fingerprint` of the stage-1 weights that it goes on top of.
    """
    mark = {"format": 1, "stage": stage.value}
    return mark if stage1 is None or stage is Stage.ALIGNMENT else mark | {"stage1": stage1}


def fingerprint(tensors: State) -> str:
    """Return a hash of a checkpoint's trained weights: the same in either layout, stripped or converted."""
    digest = sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_stage1(model: MiniGPT5, mark: Mapping[str, Any], path: str | Path, flag: str) -> None:
    """Check that a stage-2 checkpoint goes on top of the stage-1 weights it was trained on, if it says which.

    Part of the mapper stays as stage 1 left it: on top of another stage 1, stage 2's part means nothing.

    Raises:
        InputError: the model's stage-1 weights are others.
    """
    wanted = mark.get("stage1")
    if wanted is None or model.stage1 is None or wanted == model.stage1:
        return
    raise InputError(
        f"{flag} {path}: was trained on top of other stage-1 weights than --stage1_weight gave; give those (a "
        "name is looked for in WEIGHTFOLDER first: for a checkpoint that ships with the preset, give the stage-1 "
        "file that ships beside it by its path)"
    )


def wanted_keys(model: MiniGPT5, stage: Stage) -> set[str]:
    """Return the parameters that a checkpoint of ``stage`` has to hold for this model: what trained there."""
    if stage is model.stage:
        return set(trainable_state(model))
    return {name for name, _ in model.named_parameters() if name.startswith(("rows.", "mapper."))}


def load_checkpoint(model: MiniGPT5, path: Path, expected: Stage, flag: str) -> KeyReport:
    """Load a checkpoint into the model: stage 1, or stage 2 on top of it.

    Args:
        model: what it is loaded into; for stage 2 it must have been built for that stage.
        path: file or folder of either layout.
        expected: the stage that ``flag`` stands for.
        flag: named in messages.

    Raises:
        InputError: wrong stage, stage 2 before stage 1, keys or shapes that do not fit, LoRA that would not be
            applied, stage 2 on top of another stage 1 than it was trained on.
    """
    checkpoint = read_checkpoint(path, model.config.vokens.count + 1, flag)
    if checkpoint.stage is not expected:
        number = {Stage.ALIGNMENT: "stage-1", Stage.MULTIMODAL: "stage-2"}
        fault = f"is a {number[checkpoint.stage]} checkpoint, a {number[expected]} one is needed here"
        if expected is model.stage:
            fault += f"; if it is what you want, set IS_STAGE2={checkpoint.stage is Stage.MULTIMODAL}"
        raise InputError(f"{flag} {path}: {fault}")
    is_complete = model.config.mapper.stage2_trains == "whole"
    if expected is Stage.MULTIMODAL and not model.has_stage1 and not is_complete:
        raise InputError(f"{flag} {path}: stage-2 weights go on top of stage-1 weights; give --stage1_weight")
    report = KeyReport(str(path), f"{checkpoint.layout} {expected} checkpoint")
    wanted = wanted_keys(model, expected)
    found = {key: value for key, value in checkpoint.tensors.items() if key not in BASE.values()}
    _raise_for_misfit(path, report.kind, sorted(wanted - found.keys()), sorted(found.keys() - wanted))
    parameters = dict(model.named_parameters())
    wrong = [
        f"{key}: file {tuple(value.shape)}, model {tuple(parameters[key].shape)}"
        for key, value in found.items()
        if value.shape != parameters[key].shape
    ]
    if wrong:
        raise InputError(f"{flag} {path}: sizes differ from the configuration's:\n  " + "\n  ".join(wrong[:8]))
    raise_for_values(str(path), checkpoint.tensors)
    if expected is Stage.ALIGNMENT:
        model.stage1 = fingerprint(found)
    elif not is_complete:
        check_stage1(model, checkpoint.meta.get(FORMAT_KEY, {}), path, flag)
    with torch.no_grad():
        for key, value in found.items():
            parameters[key].copy_(value)
    report.loaded = sorted(found)
    _restore_base(model, checkpoint, report)
    model.has_stage1 = True
    return report


def _raise_for_misfit(path: Path, kind: str, missing: list[str], unexpected: list[str]) -> None:
    """Raise for keys that do not fit, and name the settings that make the difference."""

    def settings(keys: list[str]) -> str:
        return ", ".join(value for part, value in _SETTINGS.items() if any(part in key for key in keys))

    try:
        raise_for_keys(str(path), kind, missing, unexpected)
    except InputError as error:
        hints = [f"\n  keys of {settings(unexpected)} are in the file alone"] if settings(unexpected) else []
        hints += [f"\n  keys of {settings(missing)} are in this run's model alone"] if settings(missing) else []
        remedy = "\n  give the settings the checkpoint was trained with, e.g. --set model.adapter.kind=lora"
        raise InputError("".join([str(error), *hints, remedy if hints else ""])) from None


@torch.no_grad()
def _restore_base(model: MiniGPT5, checkpoint: Checkpoint, report: KeyReport) -> None:
    """Put a checkpoint's own frozen rows in place: the published training drifted them."""
    targets = {"base.embedding": model.backbone.embedding_VH, "base.head": model.backbone.head_VH}
    size = model.rows.base_size
    for key, target in targets.items():
        value = checkpoint.tensors.get(key)
        if value is None:
            continue
        if value.shape != target[:size].shape:
            raise InputError(
                f"{checkpoint.path}: {len(value)} rows beside the new tokens' in {key}, "
                f"the language model has {size}; is it another language model or number of vokens?"
            )
        value = value.to(target)
        change = float((value - target[:size]).abs().max())
        target[:size] = value
        report.loaded.append(key)
        report.notes.append(f"{key} restored whole (changed by at most {change:.1e})")


# ---- converting --------------------------------------------------------------------------------------------


def write_folder(checkpoint: Checkpoint, folder: Path, base: Mapping[str, Tensor]) -> None:
    """Write a checkpoint in our layout; frozen rows are left out where ``base`` holds the same bits."""
    tensors = {
        key: value.contiguous().clone()
        for key, value in checkpoint.tensors.items()
        if key not in base or not torch.equal(base[key].to(value.dtype), value)
    }
    keep = ("epoch", "global_step", "pytorch-lightning_version", "hparams_name", "hyper_parameters", FORMAT_KEY)
    meta = {key: checkpoint.meta[key] for key in keep if key in checkpoint.meta}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSOR_FILE)
    text = json.dumps({"format": 1, "stage": checkpoint.stage.value, "meta": meta}, indent=2, default=str)
    (folder / META_FILE).write_text(text + "\n", encoding="utf-8")


def convert(
    source: Path,
    target: Path,
    *,
    to: str,
    new_tokens: int,
    language_model: Path | None = None,
    stage1: Path | None = None,
) -> Checkpoint:
    """Convert a checkpoint between the layouts; a round trip is exact.

    Args:
        source: file or folder of either layout.
        target: file (``to="published"``) or folder (``to="ours"``) to write.
        to: ``published`` or ``ours``.
        new_tokens: vokens and the picture placeholder.
        language_model: LLaMA folder, for the frozen rows.
        stage1: stage-1 checkpoint that holds the frozen rows.

    Raises:
        InputError: unreadable source, another number of vokens in it, or frozen rows that are needed and nowhere
            to be found.
    """
    checkpoint = read_checkpoint(source, new_tokens)
    vocabulary = None
    if language_model is not None and (language_model / MODEL_FILE).is_file():
        vocabulary = len(load_tokenizer(language_model))
    check_voken_count(checkpoint, vocabulary)
    if to == "ours" and target.is_file():
        raise InputError(f"{target}: is a file; our layout is a folder, so name a folder to write")
    if to == "published" and target.is_dir():
        raise InputError(f"{target}: is a folder; the published layout is a file, so name a file to write")
    base = _base_rows(language_model, stage1, checkpoint, vocabulary)
    if to == "ours":
        write_folder(checkpoint, target, base)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(to_published(checkpoint, base), target)
    return checkpoint


def strip(source: Path, target: Path, new_tokens: int) -> Checkpoint:
    """Write one of our own Lightning checkpoints with its weights alone: no optimizer state, no paths.

    Raises:
        InputError: unreadable source, or one in the published layout (``convert`` is for those).
    """
    checkpoint = read_checkpoint(source, new_tokens)
    if checkpoint.layout != "ours":
        raise InputError(f"{source}: is in the published layout; use convert --to ours")
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = checkpoint.meta.get(FORMAT_KEY) or checkpoint_mark(checkpoint.stage)
    torch.save({"state_dict": checkpoint.tensors, FORMAT_KEY: mark}, target)
    return checkpoint


def _base_rows(folder: Path | None, stage1: Path | None, checkpoint: Checkpoint, vocabulary: int | None) -> State:
    """Return the language model's own rows from where they are; without those that only fill up its matrices."""
    if stage1 is not None:
        tensors = read_checkpoint(stage1, len(checkpoint.tensors["rows.embedding"]), "--stage1").tensors
        return {key: value for key, value in tensors.items() if key in BASE.values()}
    if folder is None:
        return {}
    names = {"model.embed_tokens.weight": "base.embedding", "lm_head.weight": "base.head"}
    flag = "--language_model"
    rows = {names[key]: value for key, value in folder_tensors(folder, flag) if key in names}
    sizes = {key: len(value) for key, value in checkpoint.tensors.items() if key in rows}
    return {key: value[: sizes.get(key, vocabulary)] for key, value in rows.items()}
