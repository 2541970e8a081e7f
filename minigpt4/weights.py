"""Reading published weight files, and the key report that says what became of every key.

Loading never succeeds silently into garbage: a file kind lists the keys it may hold beyond what the model wants
and the keys it may lack; every other difference, and every wrong shape, is an error that names file and keys.
"""

import ctypes
import json
import mmap
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from minigpt4.errors import InputError

SHOWN_KEYS = 8
State = dict[str, Tensor]


@dataclass(frozen=True)
class FileKind:
    """What a kind of weight file holds.

    Attributes:
        name: the kind in words, for messages.
        rename: file key → model key, or None for a key that the model does not have (``ignored`` must match it).
        ignored: patterns of file keys that are expected and not used.
        absent: patterns of model keys that the file is not expected to hold.
    """

    name: str
    rename: Callable[[str], str | None]
    ignored: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


@dataclass
class KeyReport:
    """What became of the keys of one weight file."""

    path: str
    kind: str
    loaded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.path}: {self.kind}: {len(self.loaded)} tensors loaded"
        if self.ignored:
            text += f", {len(self.ignored)} expected extras ignored"
        if self.absent:
            text += f", {len(self.absent)} left as they were ({', '.join(_short(self.absent))})"
        return "; ".join([text, *self.notes])


def read_state(path: Path, flag: str = "weights") -> State:
    """Read a state dict from ``.safetensors`` or a torch file, without unpickling code.

    A torch file's ``model`` or ``state_dict`` entry is opened.

    Raises:
        InputError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"{flag}: {path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{flag}: {path}: not a readable safetensors file: {error}") from None
    content = read_torch_file(path, flag)
    for entry in ("model", "state_dict"):
        if isinstance(content.get(entry), Mapping):
            content = content[entry]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{flag}: {path}: holds no tensors; is it a weight file?")
    return tensors


def read_state_as(path: Path, dtype: torch.dtype, flag: str = "weights") -> State:
    """Read a state dict as :func:`read_state` does, with its floating-point tensors in ``dtype``.

    Resident memory peaks at the tensors that are returned and one more of the file's: pages that were read from a
    mapped file count as resident until they are given back, so every converted tensor gives its own back at once.
    Tensors that have the type already stay what they are, pages of the file.

    Raises:
        InputError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    state = read_state(path, flag)
    is_mapped = path.suffix == ".safetensors" or _is_zip(path)
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            state[key] = tensor.to(dtype)
            if is_mapped:
                _release_pages(tensor)
    return state


def read_torch_file(path: Path, flag: str = "weights") -> dict:
    """Read a ``torch.save`` file with ``weights_only=True``, memory-mapped.

    Raises:
        InputError: the file is damaged, holds pickled code, or is no dictionary.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch raises many types here: UnpicklingError, RuntimeError, EOFError, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{flag}: {path}: not a readable weight file: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"{flag}: {path}: expected a dictionary of tensors, found {type(content).__name__}")
    return content


def load_state(
    module: nn.Module, state: Mapping[str, Tensor], kind: FileKind, path: str, dtype: torch.dtype
) -> KeyReport:
    """Load ``state`` into ``module`` (which may be on the meta device) and account for every key.

    Args:
        module: target; its floating-point tensors are replaced by ``state``'s, converted to ``dtype``.
        state: the file's keys and tensors.
        kind: what the file may hold and lack.
        path: named in messages.
        dtype: type of the loaded floating-point tensors.

    Raises:
        InputError: unexpected or missing keys, or wrong shapes.
    """
    report = KeyReport(path, kind.name)
    wanted = module.state_dict()
    found: State = {}
    unexpected = []
    for key, tensor in state.items():
        target = kind.rename(key)
        if target in wanted:
            found[target] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            report.loaded.append(key)
        elif matches(key, kind.ignored):
            report.ignored.append(key)
        else:
            unexpected.append(key)
    missing = [key for key in wanted if key not in found]
    report.absent = [key for key in missing if matches(key, kind.absent)]
    missing = [key for key in missing if not matches(key, kind.absent)]
    raise_for_keys(path, kind.name, missing, unexpected)
    shapes = [
        f"{key}: file {tuple(tensor.shape)}, model {tuple(wanted[key].shape)}"
        for key, tensor in found.items()
        if tensor.shape != wanted[key].shape
    ]
    if shapes:
        raise InputError(
            f"{path}: sizes differ from the configuration's ({kind.name}):\n  " + "\n  ".join(_short(shapes))
        )
    raise_for_values(path, found)
    module.load_state_dict(found, strict=False, assign=True)
    return report


def raise_for_keys(path: str, kind: str, missing: list[str], unexpected: list[str]) -> None:
    """Raise an :class:`InputError` naming the file and the keys, if there are any."""
    if not missing and not unexpected:
        return
    lines = [f"{path}: does not fit as {kind}; is it another kind of file?"]
    if missing:
        lines.append(f"  {len(missing)} keys missing: {', '.join(_short(missing))}")
    if unexpected:
        lines.append(f"  {len(unexpected)} keys unexpected: {', '.join(_short(unexpected))}")
    raise InputError("\n".join(lines))


def raise_for_values(path: str, state: Mapping[str, Tensor]) -> None:
    """Raise an :class:`InputError` naming the tensors that hold NaN or infinity, if there are any."""
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise InputError(f"{path}: holds NaN or infinity in {', '.join(_short(bad))}; the file is damaged")


def matches(key: str, patterns: tuple[str, ...]) -> bool:
    """Whether any regular expression matches the whole key."""
    return any(re.fullmatch(pattern, key) for pattern in patterns)


COPIES = ["*.fp16.*", "*.non_ema.*", "*.ckpt", "*.msgpack", "*.h5", "*.onnx*", "*.ot"]
"""Files of a hub repository that hold the weights once more."""
PICKLED = ["*.bin", "*.pt", "*.pth"]
"""Weights in the older format, of which newer repositories hold a second copy in safetensors."""


def resolve_source(source: str, flag: str, parts: list[str] | None = None) -> Path:
    """Return the local file or folder of a weight source: a path, a hub id or an address.

    Args:
        source: what the configuration names.
        flag: named in messages.
        parts: patterns of the files that are needed of a hub repository; None takes all but second copies.

    Raises:
        InputError: it exists neither locally nor, as far as can be reached, on the hub.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source.startswith("https://"):
        return _download(source, flag)
    if path.is_absolute() or source.startswith(".") or source.count("/") != 1 or path.suffix:
        raise InputError(f"{flag}: {source}: no such file or folder; download it or correct the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source, allow_patterns=parts, ignore_patterns=[*COPIES, *PICKLED]))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(source, allow_patterns=parts, ignore_patterns=COPIES))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{flag}: {source}: neither a local folder nor reachable on the Hugging Face hub ({reason}); "
            "download it and give its folder"
        ) from None


def read_json(path: Path, flag: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{flag}: {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{flag}: {path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{flag}: {path}: expected a JSON object, found {type(content).__name__}")
    return content


def folder_tensors(folder: Path, flag: str, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a Hugging Face folder, shard by shard: safetensors if there are any, else bin.

    Args:
        folder: the folder.
        flag: named in messages.
        skip: key prefixes that are not read, such as a language model of tens of gigabytes.

    Raises:
        InputError: the folder holds no weight files.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{flag}: {folder}: holds neither *.safetensors nor pytorch_model*.bin")
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118 - not a dictionary
                        if not key.startswith(skip):
                            yield key, tensors.get_tensor(key)
            except SafetensorError as error:
                raise InputError(f"{flag}: {file}: not a readable safetensors file: {error}") from None
        else:
            yield from ((key, value) for key, value in read_state(file, flag).items() if not key.startswith(skip))


def weight_files(folder: Path, flag: str) -> list[Path]:
    """Return the weight files of a Hugging Face folder: safetensors if there are any, else bin; whole or sharded.

    Raises:
        InputError: the folder has no weights, or its index is damaged or names files that are not there.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _indexed_files(index, flag)
    raise InputError(f"{flag}: {folder}: holds neither model.safetensors nor pytorch_model.bin, whole or sharded")


def _indexed_files(index: Path, flag: str) -> list[Path]:
    places = read_json(index, flag).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{flag}: {index}: expected the keys' files under weight_map")
    files = [index.parent / str(name) for name in sorted(set(places.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise InputError(f"{flag}: {index}: names files that are not there: {', '.join(_short(absent))}")
    return files


def _release_pages(tensor: Tensor) -> None:
    """Give back the memory of a tensor that is part of a mapped file; read again, it would come from the file.

    Only whole pages of the tensor's own, so that its neighbours keep theirs. Other systems than Linux have no
    call that surely leaves the values alone; there, the pages go when the file is closed.
    """
    if sys.platform != "linux" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        # Advice: where it is refused, nothing but memory is lost.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _download(address: str, flag: str) -> Path:
    target = Path(torch.hub.get_dir()) / "checkpoints" / address.rsplit("/", 1)[-1]
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(target))
        except OSError as error:
            raise InputError(
                f"{flag}: {address} cannot be downloaded ({error}); fetch it and give its path"
            ) from None
    return target


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _short(items: list[str]) -> list[str]:
    more = len(items) - SHOWN_KEYS
    return items if more <= 0 else [*items[:SHOWN_KEYS], f"… and {more} more"]
