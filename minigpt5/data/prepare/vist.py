"""Official VIST story-in-sequence annotations → the two JSON files of the VIST reader."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from minigpt4.errors import InputError

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")


def write_vist(annotations: Path, pictures: Path, out: Path, split: str) -> int:
    """Write ``<split>_cleaned.json`` and ``<split>_image_mapping.json``.

    Stories that lack a picture are left out, as their history would have a gap.

    Args:
        annotations: ``<split>.story-in-sequence.json`` of the VIST release.
        pictures: folder of pictures named by Flickr id, e.g. ``693397887.jpg``.
        out: folder to write to, which becomes the data folder; pictures are mapped relative to it.
        split: ``train``, ``val`` or ``test``; begins the file names.

    Returns:
        Number of stories.

    Raises:
        InputError: a file or folder is missing, of another structure, or no story is whole.
    """
    if not pictures.is_dir():
        raise InputError(f"--images {pictures}: no such folder")
    files = {path.stem: path for path in sorted(pictures.iterdir()) if path.suffix.lower() in PICTURE_SUFFIXES}
    stories = _read_stories(annotations)
    whole = {
        name: sorted(steps, key=lambda step: step["sequence_index"])
        for name, steps in stories.items()
        if all(step["image_id"] in files for step in steps)
    }
    if not whole:
        raise InputError(f"{annotations}: none of {len(stories)} stories has all its pictures in {pictures}")
    if len(whole) < len(stories):
        logger.warning("%s: %d stories lack pictures and are left out", annotations, len(stories) - len(whole))
    out.mkdir(parents=True, exist_ok=True)
    used = sorted({step["image_id"] for steps in whole.values() for step in steps})
    mapping = {name: Path(os.path.relpath(files[name].resolve(), out.resolve())).as_posix() for name in used}
    _write(out / f"{split}_cleaned.json", whole)
    _write(out / f"{split}_image_mapping.json", mapping)
    return len(whole)


def _read_stories(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--annotations {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"--annotations {path}: not JSON ({error})") from None
    stories: dict[str, list[dict[str, Any]]] = {}
    try:
        for group in values["annotations"]:
            for item in group:
                step = {
                    "caption": item["text"],
                    "image_id": str(item["photo_flickr_id"]),
                    "sequence_index": int(item["worker_arranged_photo_order"]),
                }
                stories.setdefault(str(item["story_id"]), []).append(step)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"--annotations {path}: not a VIST story-in-sequence file: `annotations` holds lists of objects with "
            f"text, photo_flickr_id, worker_arranged_photo_order and story_id ({error!r})"
        ) from None
    return stories


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
