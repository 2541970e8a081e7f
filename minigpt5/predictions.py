"""The prediction store: ``predictions.jsonl`` + ``images/*.png``, appended to as replies come.

Each line is one :class:`Prediction`; paths are relative to the store's folder. Pictures are written before
their line, so whatever has a line is whole and a killed run resumes behind it. A line that was cut off by the
kill is dropped on reopening. Several processes write one file each (``predictions.rank1.jsonl`` …).
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt4.errors import InputError

PREDICTIONS_FILE = "predictions.jsonl"
RUN_FILE = "run.json"
IMAGE_FOLDER = "images"
_CONTENT_LETTERS = 24
LEFT_OUT_FILE = "left_out.jsonl"
"""Records of the test file that could not be used, one JSON line each; absent if there were none."""


@dataclass(frozen=True)
class Prediction:
    """One reply beside what was wanted. Picture paths are relative to the store's folder."""

    id: str
    """The published task name, e.g. ``cc3m_0``, ``40470_0-gen``, ``12_3-mm``."""
    dataset: str
    task: str
    prompt: str
    text: str
    """The decoded reply with ``[IMG0]`` for each picture (published ``pred_out``)."""
    target: str
    """The wanted text (published ``gt_out``)."""
    caption: str | None = None
    description: str | None = None
    """What the wanted picture shows, where neither caption nor target say it."""
    images: tuple[str, ...] = ()
    """Generated pictures, in order."""
    target_images: tuple[str, ...] = ()
    """Wanted pictures as the model was to make them: squared and resized."""
    baseline_image: str | None = None
    """Stable Diffusion's own picture of the caption (published ``predicted_images_nl``)."""
    input_images: tuple[str, ...] = ()
    place: int | None = None
    """Of the sample in the test file; scores that depend on an order take this one, whatever process replied."""

    @property
    def wants_image(self) -> bool:
        """Whether the wanted response holds a picture."""
        return bool(self.target_images)


class PredictionStore:
    """Append predictions to a folder and know which are there.

    Args:
        folder: made if missing.
        run: plain values that identify the run (data set, checkpoint, settings). Predictions of another run in
            the same folder are refused.
        rank: process number; every process writes a file of its own.

    Raises:
        InputError: the folder holds predictions of a run with other values, or a malformed line.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], rank: int = 0) -> None:
        self.folder = folder
        (folder / IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
        self._check_run(json.loads(json.dumps(run, default=str)))
        name = PREDICTIONS_FILE if rank == 0 else f"predictions.rank{rank}.jsonl"
        self.path = folder / name
        _drop_torn_line(self.path)
        self.done: set[str] = {prediction.id for prediction in read_predictions(folder)}

    def append(
        self,
        prediction: Prediction,
        *,
        images: Iterable[Image.Image] = (),
        target_images: Iterable[Image.Image] = (),
        baseline_image: Image.Image | None = None,
        input_images: Iterable[Image.Image] = (),
    ) -> Prediction:
        """Write the pictures, then the line; returns the prediction with its picture paths filled in."""
        stem = file_stem(prediction.id)
        values = asdict(prediction)
        values["images"] = self._save(stem, "", images)
        values["target_images"] = self._save(stem, "_gt", target_images)
        values["input_images"] = tuple(self._save_once(stem, picture) for picture in input_images)
        if baseline_image is not None:
            values["baseline_image"] = self._save(stem, "_nl", [baseline_image])[0]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self.done.add(prediction.id)
        return _parse(values)

    def _save(self, stem: str, suffix: str, pictures: Iterable[Image.Image]) -> tuple[str, ...]:
        names = []
        for index, picture in enumerate(pictures):
            number = f"_{index}" if index else ""
            name = f"{IMAGE_FOLDER}/{stem}{suffix}{number}.png"
            picture.save(self.folder / name)
            names.append(name)
        return tuple(names)

    def _save_once(self, stem: str, picture: Image.Image) -> str:
        """Save a picture that other prompts may hold too, as all of a story's do, under a name by its content."""
        content = sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()
        name = f"{IMAGE_FOLDER}/in-{content[:_CONTENT_LETTERS]}.png"
        if not (self.folder / name).exists():
            partial = self.folder / f"{IMAGE_FOLDER}/{stem}.partial"  # other processes may be saving it, too
            picture.save(partial, "PNG")
            partial.replace(self.folder / name)
        return name

    def _check_run(self, run: dict[str, Any]) -> None:
        path = self.folder / RUN_FILE
        if path.is_file() and any(self.folder.glob("predictions*.jsonl")):
            known = json.loads(path.read_text(encoding="utf-8"))
            if known == run:
                return
            changed = sorted(key for key in known.keys() | run.keys() if known.get(key) != run.get(key))
            if changed:
                raise InputError(
                    f"{self.folder} holds predictions of another run (different: {', '.join(changed)}); "
                    "delete the folder or set OUTPUT_SUFFIX to write beside it"
                )
        path.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_predictions(folder: Path) -> list[Prediction]:
    """Read every process's predictions of a folder, the first of each id, in the test file's order.

    Those that do not say their place stand behind the others, as they come.

    Raises:
        InputError: no folder, or a line that is no prediction (file and line are named).
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no predictions there; run train_eval.py with --test_data_path first")
    found: dict[str, Prediction] = {}
    for path in sorted(folder.glob("predictions*.jsonl")):
        # A last line without its break is being written, or was when its process was killed, in mid-letter even.
        lines = path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                prediction = _parse(json.loads(line))
            except (ValueError, TypeError) as error:
                raise InputError(f"{path}:{number}: not a prediction: {error}") from None
            found.setdefault(prediction.id, prediction)
    last = max((one.place for one in found.values() if one.place is not None), default=0) + 1
    return sorted(found.values(), key=lambda one: last if one.place is None else one.place)


def count_left_out(folder: Path) -> int:
    """Return how many records of the test file were left out of a store's run."""
    path = folder / LEFT_OUT_FILE
    return path.read_text(encoding="utf-8").count("\n") if path.is_file() else 0


def file_stem(sample_id: str) -> str:
    """Return a file name for an id; characters a file system may refuse are replaced and a hash added."""
    stem = re.sub(r"[^0-9A-Za-z_.-]+", "_", sample_id)
    return stem if stem == sample_id else f"{stem}-{sha256(sample_id.encode()).hexdigest()[:8]}"


def _parse(values: dict[str, Any]) -> Prediction:
    lists = {"images", "target_images", "input_images"}
    fields: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in values.items()}
    return Prediction(**fields)


def _drop_torn_line(path: Path) -> None:
    """Cut a last line without its line break: the process was killed while writing it."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)


def run_folder(outputs: Path, test_weight: Path, suffix: str) -> Path:
    """Return the store of one checkpoint: its name without its ending and the suffix, below ``outputs``.

    As published, folders of a relative name are kept (``vist/best.ckpt`` → ``outputs/vist/best``); an absolute
    path counts by its file name.
    """
    name = test_weight.stem + suffix
    keeps_folders = not test_weight.is_absolute() and ".." not in test_weight.parts
    return outputs / test_weight.parent / name if keeps_folders else outputs / name
