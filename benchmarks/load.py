"""Loading the language model: peak resident memory and seconds, over a synthetic checkpoint of several GB.

The model is wanted in bfloat16. The files are float16, as Vicuna's, so that every tensor is converted, and again
bfloat16, so that none is. The reference is what transformers 4.31 does for the published code: build the model,
read a whole shard of the float16 files, copy it.
"""

import gc
import hashlib
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import worlds
from benchmarks.harness import Report, Settings, in_child, peak_bytes
from minigpt4.config import LanguageModelConfig
from minigpt4.errors import InputError
from minigpt4.language_model import load_language_model
from minigpt4.tokenizer import MODEL_FILE
from minigpt5.plan import GIBIBYTE

_COMMON = {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "mid": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 28, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
LAYOUTS = {
    "bin float16": torch.float16,
    "safetensors float16": torch.float16,
    "bin bfloat16": torch.bfloat16,
    "safetensors bfloat16": torch.bfloat16,
}
REFERENCE_LAYOUT = "bin float16"
FIRST_SHARD = 0.74
"""Share of the first of two shards, as in Vicuna-7B's folder."""


def measure(settings: Settings) -> Report:
    """Load the same tensors from every layout, each path once, in a process of its own; ours to the device.

    Raises:
        InputError: too little room for one layout's files.
    """
    report = Report(settings, rounds=1)
    found = {}
    for layout, dtype in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            size = _write(Path(folder) / layout, dtype, settings) / GIBIBYTE
            for path in ("reference", layout) if layout == REFERENCE_LAYOUT else (layout,):
                found[path] = in_child(settings, f"{path}:{folder}")
    digests = {str(values["digest"]) for values in found.values()}
    if len(digests) != 1:
        raise AssertionError(f"the paths loaded different weights: {digests}")
    report.equal.append(f"every loaded tensor of a {size:.2f} GiB checkpoint, in bfloat16")
    published = found["reference"]
    for path in LAYOUTS:
        report.add(f"{path}: time", "s", published["seconds"], found[path]["seconds"])
        for name, label in (("peak", "peak resident"), ("anonymous", "peak without file pages")):
            theirs, ours = (values[name] / GIBIBYTE for values in (published, found[path]))
            note = f"{ours / size:.2f} × the checkpoint"
            report.add(f"{path}: {label}", "GiB", theirs, ours, note=note)
    return report


def measure_alone(settings: Settings, path: str) -> dict[str, Any]:
    """Load once; returns seconds, bytes beyond what the imports took, and a digest of the weights."""
    how, _, folder = path.partition(":")
    on_gpu = settings.device.type == "cuda"
    if on_gpu:
        torch.zeros(1, device=settings.device)  # CUDA's own start is no part of loading
    before = peak_bytes(torch.device("cpu"))
    watch = _AnonymousPeak()
    start = time.perf_counter()
    if how == "reference":
        model = _load_as_published(Path(folder) / REFERENCE_LAYOUT).to(settings.device)
    else:
        config = LanguageModelConfig(weights=str(Path(folder) / how))
        model, _, _ = load_language_model(config, torch.bfloat16, settings.device)
    if on_gpu:
        torch.cuda.synchronize(settings.device)
        seconds = time.perf_counter() - start
    digest = _digest(model)
    if not on_gpu:
        # A mapped file costs nothing until it is read, so every tensor is read before the clock stops.
        seconds = time.perf_counter() - start
    peak = peak_bytes(torch.device("cpu")) - before
    return {"seconds": seconds, "peak": peak, "anonymous": watch.stop(), "digest": digest}


class _AnonymousPeak:
    """Samples this process's anonymous memory, which, unlike pages of a mapped file, cannot be given back."""

    def __init__(self) -> None:
        self._before = self._peak = _anonymous_bytes()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.005):
            self._peak = max(self._peak, _anonymous_bytes())

    def stop(self) -> int:
        """Return the peak above the beginning, in bytes."""
        self._stopped.set()
        self._thread.join()
        return max(self._peak, _anonymous_bytes()) - self._before


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def _load_as_published(folder: Path) -> LlamaForCausalLM:
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    model = empty.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()  # stands for the published build, which fills every weight; drawing takes longer
    for shard in sorted(folder.glob("*.bin")):
        state = torch.load(shard, map_location="cpu", weights_only=True)
        model.load_state_dict(state, strict=False)
        del state
        gc.collect()
    return model


def _digest(model: LlamaForCausalLM) -> str:
    digest = hashlib.sha256()
    for name, held in sorted(model.state_dict().items()):
        tensor = held.cpu()
        assert tensor.dtype is torch.bfloat16
        digest.update(f"{name} {tensor.flatten()[:4].tolist()}".encode())
        # Through NumPy, as torch's sum of bfloat16 would first make a copy.
        digest.update(str(tensor.view(torch.int16).numpy().sum(dtype=np.int64)).encode())
    return digest.hexdigest()


def _write(folder: Path, dtype: torch.dtype, settings: Settings) -> int:
    """Write the checkpoint in the layout that the folder is named by; returns the tensors' bytes."""
    config = LlamaConfig(**_COMMON, **SIZES[settings.preset])
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    total = sum(2 * shape.numel() for shape in shapes.values())
    folder.mkdir()
    if (free := shutil.disk_usage(folder).free) < total:
        raise InputError(
            f"{folder.parent}: {total / GIBIBYTE:.1f} GiB of files are written there for a while, and "
            f"{free / GIBIBYTE:.1f} GiB are free; let TMPDIR name a folder with more room"
        )
    shards: list[list[str]] = [[], []]
    before = 0
    for name, shape in shapes.items():
        shards[before >= FIRST_SHARD * total].append(name)
        before += 2 * shape.numel()
    suffix = folder.name.partition(" ")[0]
    stem, save = ("pytorch_model", torch.save) if suffix == "bin" else ("model", _save_safetensors)
    generator = torch.Generator().manual_seed(settings.seed)
    places = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-0000{number}-of-0000{len(shards)}.{suffix}"
        save({name: _noise(shapes[name], generator).to(dtype) for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    shutil.copy(worlds.TINY_WEIGHTS / "llama" / MODEL_FILE, folder / MODEL_FILE)
    return total


def _noise(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return a small float16 tensor; random bits are made much faster than normal draws."""
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
    return bits.to(torch.float16).mul_(2**-20)


def _save_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
