"""Small pictures, files and real tokenizers for the data tests."""

from pathlib import Path

import numpy as np
from PIL import Image

from minigpt5.data.index import ReadOptions
from minigpt5.data.types import Split
from minigpt5.prompts import HashedChoice
from minigpt5.vokens import voken_text

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures" / "data"
VOKENS = voken_text(8)


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (12, 9)) -> Path:
    """Write a picture of noise, unlike its mirror image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def make_options(folder: Path, split: Split = Split.TRAIN, **changes) -> ReadOptions:
    values = {
        "split": split,
        "folder": folder,
        "voken_text": VOKENS,
        "choose": HashedChoice(0),
        "count_tokens": lambda text: len(text.split()),
    }
    return ReadOptions(**(values | changes))


def make_cc3m(folder: Path, rows: int) -> Path:
    """Write a CC3M data folder with pictures; returns the table's path relative to it."""
    lines = ["caption\timage_path"]
    for row in range(rows):
        draw(folder / f"train/{row:05d}.jpg", seed=row)
        lines.append(f"Caption number {row}.\ttrain/{row:05d}.jpg")
    (folder / "cc3m.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path("cc3m.tsv")


def samples_of(index) -> list:
    return [index[position] for position in range(len(index))]
