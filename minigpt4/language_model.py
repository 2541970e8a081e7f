"""LLaMA-family language model: built from its configuration or loaded from a Hugging Face folder."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from minigpt4.config import LanguageModelConfig
from minigpt4.errors import InputError
from minigpt4.tokenizer import MODEL_FILE, LlamaTokenizer
from minigpt4.weights import (
    KeyReport,
    State,
    matches,
    raise_for_keys,
    read_json,
    read_state,
    read_state_as,
    resolve_source,
    weight_files,
)

FLAG = "model.backbone.language_model"
ADDED_FILE = "added_tokens.json"

# Old files store the rotary frequencies, which transformers computes.
_IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def build_language_model(config: LanguageModelConfig) -> LlamaForCausalLM:
    """Build the language model with random weights (under ``torch.device("meta")``: with none).

    Raises:
        InputError: no architecture is given.
    """
    if config.architecture is None:
        raise InputError(f"{FLAG}: give weights (a folder or hub id) or an architecture")
    return LlamaForCausalLM(LlamaConfig(**config.architecture))


def load_language_model(
    config: LanguageModelConfig, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[LlamaForCausalLM, LlamaTokenizer, KeyReport]:
    """Load a LLaMA folder (safetensors or sharded bin) with its SentencePiece tokenizer.

    Args:
        config: the folder, what it should hold, and whether its layers are quantized.
        dtype: of everything that is not quantized.
        device: where the model is made (default: the CPU). Elsewhere than on the CPU, every tensor goes there
            from the mapped file by itself, so that the host holds no copy of the model.

    Raises:
        InputError: the folder lacks a file, is no LLaMA, differs from the configured architecture, lacks
            weights, or has fewer embedding rows than the tokenizer has tokens; or bitsandbytes is needed and
            missing.
    """
    assert config.weights is not None
    check_quantization(config)
    folder = resolve_source(config.weights, f"{FLAG}.weights")
    architecture = _read_architecture(folder, config)
    tokenizer = load_tokenizer(folder)
    try:
        model, info = _load_folder(folder, architecture, dtype, _placement(config, dtype, device))
    except InputError:
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{FLAG}.weights: {folder}: the GPU has too little free memory for it; give --quantization 8bit or "
            "4bit, or a larger or idle card (train_eval.py --plan says what a run needs): "
            f"{str(error).splitlines()[0]}"
        ) from None
    except Exception as error:  # a damaged file raises nearly anything here, SafetensorError to IndexError
        raise InputError(f"{FLAG}.weights: {folder}: cannot be loaded: {error}") from None
    if info["mismatched_keys"]:
        raise InputError(f"{FLAG}.weights: {folder}: sizes differ from config.json: {info['mismatched_keys']}")
    unexpected = sorted(key for key in info["unexpected_keys"] if not matches(key, _IGNORED))
    raise_for_keys(str(folder), "LLaMA", sorted(info["missing_keys"]), unexpected)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise InputError(f"{folder}: {len(tokenizer)} tokens in {MODEL_FILE} but {rows} embedding rows")
    report = KeyReport(str(folder), "LLaMA (Hugging Face)", loaded=sorted(model.state_dict()))
    if rows > len(tokenizer):
        report.notes.append(f"embedding rows from {len(tokenizer)} on have no token and are not used")
    return model, tokenizer, report


def check_quantization(config: LanguageModelConfig) -> None:
    """Check that the package and the GPU that the configured quantization needs are there.

    Raises:
        InputError: they are not.
    """
    if config.quantization == "4bit" and not torch.cuda.is_available():
        # On a CPU, bitsandbytes repacks NF4 when it generates, which fails for widths that 32 does not divide.
        raise InputError(f"{FLAG}.quantization: 4bit: needs a GPU, and this machine has none; take 8bit or none")
    if config.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"{FLAG}.quantization: {config.quantization}: its package is not installed; "
            "run: pip install bitsandbytes"
        )


def _load_folder(
    folder: Path, architecture: LlamaConfig, dtype: torch.dtype, placement: dict[str, Any]
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Build the model on a folder's tensors; returns what transformers says of their keys, too.

    On the CPU, transformers itself would convert out of files that stay mapped to the end, so that the model and
    the files' pages are resident together: twice the checkpoint.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its own key warnings; the caller's report replaces them
    transformers_logging.disable_progress_bar()
    try:
        model, info = LlamaForCausalLM.from_pretrained(
            None,
            config=architecture,
            state_dict=_read_folder(folder, None if placement else dtype),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the caller can list them with their names
            **placement,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.config.name_or_path = model.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, info


def _read_folder(folder: Path, dtype: torch.dtype | None) -> State:
    """Return a folder's tensors in a type; None leaves them pages of the files.

    That is for a model that is quantized or made on another device: transformers does either tensor by tensor,
    and converted before that they would all be in memory.
    """
    flag = f"{FLAG}.weights"
    state: State = {}
    for file in weight_files(folder, flag):
        state |= read_state(file, flag) if dtype is None else read_state_as(file, dtype, flag)
    return state


def _placement(config: LanguageModelConfig, dtype: torch.dtype, device: torch.device | None) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs to make the model elsewhere or quantized; nothing where it is neither.

    Quantized are the layers; embedding and head stay as they are. bitsandbytes' layouts differ between devices, so
    a quantized model is made where it will run.
    """
    device = device or torch.device("cpu")
    if config.quantization == "none":
        return {} if device.type == "cpu" else {"device_map": {"": device}}
    settings = BitsAndBytesConfig(
        load_in_8bit=config.quantization == "8bit",
        load_in_4bit=config.quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def load_tokenizer(folder: Path) -> LlamaTokenizer:
    """Load a LLaMA folder's SentencePiece tokenizer with its maximum length and the tokens the folder adds.

    Raises:
        InputError: a file is missing or malformed, or the folder already adds a voken.
    """
    path = folder / ADDED_FILE
    added = read_json(path, FLAG) if path.is_file() else {}
    vokens = [token for token in added if token.startswith("[IMG") or token == "<ImageHere>"]
    if vokens:
        raise InputError(f"{path}: already has {', '.join(vokens)}; give an unmodified LLaMA folder")
    tokenizer = LlamaTokenizer(folder / MODEL_FILE, _max_length(folder))
    behind = [token for token in added if tokenizer.token_to_id(token) != added[token]]
    tokenizer.add_tokens(sorted(behind, key=lambda token: added[token]))
    wrong = [token for token in behind if tokenizer.token_to_id(token) != added[token]]
    if wrong:
        raise InputError(f"{path}: {', '.join(wrong)} do not follow the vocabulary of {MODEL_FILE} without a gap")
    return tokenizer


def _max_length(folder: Path) -> int | None:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    length = read_json(path, FLAG).get("model_max_length")
    # transformers writes a huge number where there is no limit
    return int(length) if length is not None and length < 10**9 else None


def _read_architecture(folder: Path, config: LanguageModelConfig) -> LlamaConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{FLAG}.weights: {folder}: has no config.json; give a Hugging Face LLaMA folder")
    values = read_json(path, FLAG)
    if values.get("model_type") != "llama":
        raise InputError(f"{path}: model_type is {values.get('model_type')!r}, expected 'llama'")
    architecture = LlamaConfig.from_pretrained(folder)
    for key, value in (config.architecture or {}).items():
        # Vicuna's fixed-up folders have a padding row more; only the tokenizer's rows are used.
        if key != "vocab_size" and getattr(architecture, key, value) != value:
            raise InputError(
                f"{FLAG}.architecture.{key} is {value!r} but {path} has {getattr(architecture, key)!r}"
            )
    return architecture
