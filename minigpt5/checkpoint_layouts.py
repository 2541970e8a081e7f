"""The published checkpoint layout of both stages, as names of our own parameters and back.

A published stage-1 file holds the whole embedding and output matrices (weight decay drifted their frozen rows),
the mapper and its queries. A stage-2 file holds the matrices under peft's ``modules_to_save`` names, LoRA and the
mapper's transformer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4.errors import InputError
from minigpt4.weights import State, raise_for_keys
from minigpt5.checkpoint_command import MAX_VOKENS
from minigpt5.config import Stage

BASE = {"rows.embedding": "base.embedding", "rows.head": "base.head"}
"""New rows → the frozen rows above them, where a file holds whole matrices."""

_LLAMA = {Stage.ALIGNMENT: "model.llama_model.", Stage.MULTIMODAL: "model.llama_model.base_model.model."}
_SAVED = {Stage.ALIGNMENT: "", Stage.MULTIMODAL: "modules_to_save.default."}
_MAPPER = {"mapper.transformer.": "llm_to_t2i_mapping.", "mapper.mlp.": "fc."}
_QUERIES = {"mapper.queries": "t2i_decoder_prompt"}
_LORA = "backbone.language_model."
_STATE = ("loops", "callbacks", "optimizer_states", "lr_schedulers")
ROUND_VOCABULARY = 100


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors under the model's own names, whatever layout it was read from."""

    path: str
    stage: Stage
    layout: str
    """``published`` or ``ours``."""
    tensors: State
    """Trainable parameters, and ``base.*`` where the file holds the frozen rows too."""
    meta: Mapping[str, Any]
    """The file's plain top-level values (epoch, hyper-parameters …)."""


def published_stage(state: State, path: Path, flag: str) -> Stage:
    """Return which stage a published file belongs to.

    Raises:
        InputError: it is no MiniGPT-5 checkpoint.
    """
    if any("modules_to_save" in key or "lora_" in key for key in state):
        return Stage.MULTIMODAL
    if "t2i_decoder_prompt" in state:
        return Stage.ALIGNMENT
    keys = ", ".join(list(state)[:4])
    raise InputError(f"{flag}: {path}: is no MiniGPT-5 checkpoint (its keys begin {keys})")


def check_voken_count(checkpoint: Checkpoint, vocabulary: int | None = None) -> None:
    """Check that a published file was cut into frozen and new rows at the right place.

    The file holds both in one matrix and does not say how many are new.

    Args:
        checkpoint: as read with the number of vokens that ``--vokens`` says.
        vocabulary: tokens of the language model without the new ones. None assumes what LLaMA's tokenizers have:
            a round number of them, and at most one for padding; where no number of vokens gives that, nothing is
            said.

    Raises:
        InputError: the file's rows make another number of vokens.
    """
    if checkpoint.layout != "published":
        return
    count = len(checkpoint.tensors["rows.embedding"]) - 1
    rows = len(checkpoint.tensors["base.embedding"]) + count + 1
    if vocabulary is not None:
        found, remedy = rows - 1 - vocabulary, "give that number, or the --language_model it was trained with"
    elif (rows - 1 - count) % ROUND_VOCABULARY <= 1:
        return
    else:
        found = (rows - 1) % ROUND_VOCABULARY
        remedy = "give that number, or its --language_model, if that has another vocabulary"
        if not 0 < found <= MAX_VOKENS:
            return
    if found != count:
        raise InputError(
            f"--vokens {count}: {checkpoint.path} has {found}: {rows} rows are {rows - 1 - found} of the language "
            f"model, {found} vokens and the picture placeholder; {remedy}"
        )


def keeps_training_state(checkpoint: Checkpoint, to: str) -> bool:
    """Whether writing a checkpoint in a layout loses nothing of its training: it has no optimizer state, or stays.

    The layouts train different parameters (the published one whole matrices), so a state fits its own alone.
    """
    return not checkpoint.meta.get("optimizer_states") or to == checkpoint.layout == "published"


def _matrix_names(stage: Stage) -> dict[str, str]:
    llama, saved = _LLAMA[stage], _SAVED[stage]
    return {
        "rows.embedding": f"{llama}model.embed_tokens.{saved}weight",
        "rows.head": f"{llama}lm_head.{saved}weight",
    }


def from_published(state: State, stage: Stage, new_tokens: int, path: Path) -> State:
    """Return a published file's tensors under our names; whole matrices are cut into frozen and new rows.

    Raises:
        InputError: a matrix is missing or a key unknown.
    """
    found: State = {}
    matrices = {name: ours for ours, name in _matrix_names(stage).items()}
    unexpected = []
    for key, tensor in state.items():
        if key in matrices:
            rows = matrices[key]
            found[BASE[rows]] = tensor[:-new_tokens]
            found[rows] = tensor[-new_tokens:]
        elif (ours := _own_name(key, stage)) is not None:
            found[ours] = tensor
        else:
            unexpected.append(key)
    missing = [name for name, ours in matrices.items() if ours not in found]
    raise_for_keys(str(path), f"a published {stage} checkpoint", missing, unexpected)
    return found


def _own_name(key: str, stage: Stage) -> str | None:
    for ours, published in _QUERIES.items():
        if key == published:
            return ours
    for ours, published in _MAPPER.items():
        if key.startswith(published):
            return ours + key.removeprefix(published)
    llama = _LLAMA[stage]
    if stage is Stage.MULTIMODAL and key.startswith(llama) and "lora_" in key:
        return _LORA + key.removeprefix(llama)
    return None


def to_published(checkpoint: Checkpoint, base: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the content of a published Lightning file.

    Args:
        checkpoint: what to write.
        base: ``base.embedding`` and ``base.head``, for a checkpoint that does not hold the frozen rows.

    Raises:
        InputError: the frozen rows are in neither.
    """
    base = {**base, **{key: value for key, value in checkpoint.tensors.items() if key in BASE.values()}}
    missing = sorted(set(BASE.values()) - base.keys())
    if missing:
        raise InputError(
            f"{checkpoint.path}: does not hold the language model's own rows, which a published file does; "
            "give --language_model FOLDER or --stage1 FILE"
        )
    matrices = _matrix_names(checkpoint.stage)
    state: State = {}
    for key, tensor in checkpoint.tensors.items():
        if key in matrices:
            state[matrices[key]] = torch.cat([base[BASE[key]].to(tensor.dtype), tensor])
        elif key not in BASE.values():
            state[find_published_name(key, checkpoint.stage)] = tensor
    plain = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.0.0",
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {},
    }
    dropped = () if checkpoint.layout == "published" else _STATE
    kept = {key: checkpoint.meta[key] for key in plain if key in checkpoint.meta and key not in dropped}
    return {**plain, **kept, "state_dict": state}


def find_published_name(key: str, stage: Stage) -> str:
    """Return the published name of one of our parameters (not of the new rows, which share a matrix).

    Raises:
        InputError: the published model has no such part.
    """
    for ours, published in {**_MAPPER, _LORA: _LLAMA[stage]}.items():
        if key.startswith(ours):
            return published + key.removeprefix(ours)
    if key not in _QUERIES:
        raise InputError(
            f"{key}: the published layout has no place for it; it holds new rows, LoRA and the transformer mapper"
        )
    return _QUERIES[key]
