"""An img2dataset folder → the tab-separated file of the CC3M reader."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from minigpt4.errors import InputError

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def write_cc3m(pictures: Path, out: Path) -> int:
    """Write ``caption`` and ``image_path`` of every captioned picture below a folder.

    Args:
        pictures: img2dataset's output with ``--output_format files``: ``NNNNN/NNNNNNNNN.jpg`` with the caption
            in ``.txt`` or ``.json`` beside each.
        out: written; image paths are relative to its folder, which becomes the data folder.

    Returns:
        Number of rows.

    Raises:
        InputError: no such folder, not below the data folder, or nothing captioned in it.
    """
    if not pictures.is_dir():
        raise InputError(f"--images {pictures}: no such folder")
    folder = out.resolve().parent
    if not pictures.resolve().is_relative_to(folder):
        raise InputError(f"--images {pictures}: must lie below {folder}, the folder of --out")
    rows = list(_rows(pictures.resolve(), folder))
    if not rows:
        raise InputError(f"--images {pictures}: no pictures with a .txt or .json caption beside them")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(f"{row}\n" for row in ["caption\timage_path", *rows]), encoding="utf-8")
    return len(rows)


def _rows(pictures: Path, folder: Path) -> Iterator[str]:
    uncaptioned = 0
    for path in sorted(path for path in pictures.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES):
        caption = _caption(path)
        if caption is None:
            uncaptioned += 1
            continue
        yield f"{' '.join(caption.split())}\t{path.relative_to(folder).as_posix()}"
    if uncaptioned:
        logger.warning("%s: %d pictures have no caption and are left out", pictures, uncaptioned)


def _caption(picture: Path) -> str | None:
    text, record = picture.with_suffix(".txt"), picture.with_suffix(".json")
    try:
        if text.is_file():
            return text.read_text(encoding="utf-8")
        if record.is_file():
            caption = json.loads(record.read_text(encoding="utf-8")).get("caption")
            return caption if isinstance(caption, str) else None
    except ValueError as error:
        raise InputError(f"{text if text.is_file() else record}: cannot be read ({error})") from None
    return None
