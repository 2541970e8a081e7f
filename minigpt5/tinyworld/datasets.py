"""Write tiny-world data sets of any size in the published layouts of CC3M, VIST and MMDialog.

The same seed, split and record number give the same record whatever the size. Training files hold only training
combinations; validation and test files only held-out ones.
"""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt4.errors import InputError
from minigpt5.tinyworld.captions import caption
from minigpt5.tinyworld.dialogues import make_dialogue
from minigpt5.tinyworld.renderer import render
from minigpt5.tinyworld.scenes import Scene, random_scene, seeded
from minigpt5.tinyworld.stories import make_story

JPEG_QUALITY = 95
_TWO_THINGS_SHARE = 0.3
_STORY_NUMBERS = {"train": 10_000, "validation": 40_000}
"""First story number of each split, so that no two splits share one."""


@dataclass(frozen=True)
class Sizes:
    """Records to write for each split; 0 leaves the split out. CC3M and VIST have no test file."""

    train: int
    validation: int
    test: int = 0


def write_datasets(folder: Path, sizes: Sizes, seed: int, names: tuple[str, ...] = ()) -> dict[str, int]:
    """Write ``folder/CC3M``, ``folder/VIST`` and ``folder/MMDialog``.

    Args:
        folder: made if missing; files of the same name are overwritten.
        sizes: records of each split.
        seed: decides every record.
        names: keys of :data:`WRITERS` to write; empty writes all.

    Returns:
        Written file → number of its records.

    Raises:
        InputError: a negative size, an unknown name, or a file where a folder belongs or the reverse.
    """
    if unknown := sorted(set(names) - set(WRITERS)):
        raise InputError(f"no tiny data set {', '.join(unknown)}; known: {', '.join(WRITERS)}")
    counts = {"train": sizes.train, "validation": sizes.validation, "test": sizes.test}
    if negative := [f"{split} {count}" for split, count in counts.items() if count < 0]:
        raise InputError(f"sizes cannot be negative: {', '.join(negative)}")
    written: dict[str, int] = {}
    for name in names or tuple(WRITERS):
        for split, count in counts.items():
            if count:
                try:
                    written |= WRITERS[name](folder, split, count, seed)
                except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
                    where = error.filename or folder
                    raise InputError(
                        f"--out {folder}: cannot write {where} ({error.strerror}); give another or remove it"
                    ) from None
    return written


def picture_scene(seed: int, split: str, index: int) -> tuple[Scene, str]:
    """Return scene and caption of a CC3M-like record; about a third show two things."""
    rng = seeded(seed, split, "caption", index)
    scene = random_scene(rng, split, things=2 if rng.random() < _TWO_THINGS_SHARE else 1)
    return scene, caption(scene, rng)


def media_id(*parts: int | str) -> str:
    """Return a signed 64-bit number as MMDialog's media names are."""
    digest = sha256(":".join(map(str, parts)).encode()).digest()
    return str(int.from_bytes(digest[:8], "big", signed=True))


def save_picture(scene: Scene, path: Path, *key: int | str) -> Image.Image:
    """Render a scene with the jitter that ``key`` (seed, split, ...) decides and write it as a JPEG."""
    seed, split, *rest = key
    picture = render(scene, seeded(int(seed), str(split), "jitter", *rest))
    picture.save(path, quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return picture


def _write_cc3m(folder: Path, split: str, count: int, seed: int) -> Mapping[str, int]:
    if split == "test":
        return {}
    short = "val" if split == "validation" else split
    root = folder / "CC3M"
    (root / short).mkdir(parents=True, exist_ok=True)
    path = root / f"cc3m_{short}.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["caption", "image_path"])
        for index in range(count):
            scene, text = picture_scene(seed, split, index)
            image_path = f"{short}/{index:09d}.jpg"
            save_picture(scene, root / image_path, seed, split, "cc3m", index)
            table.writerow([text, image_path])
    return {str(path): count}


def _write_vist(folder: Path, split: str, count: int, seed: int) -> Mapping[str, int]:
    if split == "test":
        return {}
    short = "val" if split == "validation" else split
    root = folder / "VIST"
    (root / f"{short}_images").mkdir(parents=True, exist_ok=True)
    stories: dict[str, list[dict[str, Any]]] = {}
    mapping: dict[str, str] = {}
    for index in range(count):
        records = []
        for number, step in enumerate(make_story(seed, split, index).steps):
            picture = len(mapping)
            image_id = str(int(media_id(seed, split, "vist", index, number)) % 10**9)
            while image_id in mapping:
                image_id = str((int(image_id) + 1) % 10**9)
            mapping[image_id] = f"{short}_images/{picture:09d}.jpg"
            save_picture(step.scene, root / mapping[image_id], seed, split, "vist", index, number)
            records.append({"caption": step.text, "image_id": image_id, "sequence_index": number})
        stories[str(_STORY_NUMBERS[split] + index)] = records
    path = root / f"{short}_cleaned.json"
    path.write_text(json.dumps(stories, indent=4) + "\n", encoding="utf-8")
    (root / f"{short}_image_mapping.json").write_text(json.dumps(mapping, indent=4) + "\n", encoding="utf-8")
    return {str(path): count}


def _write_mmdialog(folder: Path, split: str, count: int, seed: int) -> Mapping[str, int]:
    root = folder / "MMDialog" / split
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{split}_conversations.txt"
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            conversation = []
            for number, turn in enumerate(make_dialogue(seed, split, index)):
                parts = [{"__TEXT__": turn.text}]
                if turn.scene is not None:
                    name = media_id(seed, split, "mmdialog", index, number)
                    save_picture(turn.scene, root / f"{name}.jpg", seed, split, "mmdialog", index, number)
                    parts.append({"__MEDIA__": name})
                conversation.append({"turn": parts})
            record = {
                "conversation_id": index,
                "conversation": conversation,
                "negative_candidate_media_keys": [],
                "negative_candidate_texts": [],
            }
            file.write(json.dumps(record) + "\n")
    return {str(path): count}


WRITERS: dict[str, Callable[[Path, str, int, int], Mapping[str, int]]] = {
    "cc3m": _write_cc3m,
    "vist": _write_vist,
    "mmdialog": _write_mmdialog,
}
