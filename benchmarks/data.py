"""Indexing CC3M: seconds and memory for 200 000 rows; and the padding that length buckets save.

The reference walks over a pandas table row by row, keeps a list of strings a column and pickles these lists for
the next start, as published.
"""

import pickle
import re
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import MEBIBYTE, Report, Settings, in_child, peak_bytes
from minigpt5 import prompts
from minigpt5.config import DataConfig, DatasetName
from minigpt5.data.loading import EpochSampler
from minigpt5.data.readers import open_index
from minigpt5.data.types import Split
from minigpt5.tinyworld.captions import caption
from minigpt5.tinyworld.scenes import random_scene, seeded
from minigpt5.vokens import voken_text

ROWS = {"tiny": 20_000, "mid": 200_000, "7b": 3_000_000}
CPU = torch.device("cpu")
FILE = "train.tsv"
KEPT = "train.pickle"
INSTRUCTION_EVERY = 100
BATCH_SIZE = 4


def measure(settings: Settings) -> Report:
    """Index the same file both ways, each in a process of its own, in turn."""
    report = Report(settings, rounds=max(1, settings.repeats // 2))
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), ROWS[settings.preset], settings.seed)
        runs: dict[str, list[dict[str, Any]]] = {"reference": [], "reference_again": [], "ours": []}
        for _ in range(report.rounds):
            for path, found in runs.items():
                found.append(in_child(settings, f"{path}:{folder}"))
    digests = {run["digest"] for found in runs.values() for run in found}
    if len(digests) != 1:
        raise AssertionError("the paths indexed different samples")
    medians = {
        path: {key: float(np.median([run[key] for run in found])) for key in ("seconds", "peak", "random")}
        for path, found in runs.items()
    }
    report.equal.append(
        f"captions and pictures of all {ROWS[settings.preset]:,} rows and their instruction variants"
    )
    published, ours = medians["reference"], medians["ours"]
    report.add("index", "s", published["seconds"], ours["seconds"])
    again = medians["reference_again"]["seconds"]
    report.add("index, next start", "s", again, ours["seconds"], note="reference: its lists unpickled")
    report.add("index, peak memory", "MiB", published["peak"] / MEBIBYTE, ours["peak"] / MEBIBYTE)
    report.add("one sample of an index", "µs", published["random"] * 1e6, ours["random"] * 1e6)
    _add_padding(report)
    return report


def measure_alone(settings: Settings, path: str) -> dict[str, Any]:
    """Index once; returns seconds, bytes beyond the imports', seconds a sample and a digest of all samples."""
    how, _, name = path.partition(":")
    folder = Path(name)
    if how == "reference":
        import pandas as pd  # noqa: F401  its import is no part of indexing
    make = {"reference": _published_index, "reference_again": _published_index_again, "ours": _our_index}[how]
    before = peak_bytes(CPU)
    start = time.perf_counter()
    index: Any = make(folder)
    seconds = time.perf_counter() - start
    peak = peak_bytes(CPU) - before
    if how == "reference":
        (folder / KEPT).write_bytes(pickle.dumps(index))
    # Pairs of caption and picture are for the comparison alone; the published code keeps lists.
    samples: Any = index if how == "ours" else list(zip(*index[:2], strict=True))
    order = np.random.default_rng(settings.seed).permutation(len(samples))[:10_000]
    start = time.perf_counter()
    for number in order:
        samples[int(number)]
    random = (time.perf_counter() - start) / len(order)
    return {"seconds": seconds, "peak": peak, "random": random, "digest": _digest(samples)}


def _digest(samples: Any) -> str:
    """Return a digest of every sample's caption and picture, in order."""
    digest = sha256()
    for number in range(len(samples)):
        sample = samples[number]
        key = sample if isinstance(sample, tuple) else (sample.caption, str(sample.output_images[0]))
        digest.update(repr(key).encode())
    return digest.hexdigest()


def _our_index(folder: Path) -> Any:
    config = DataConfig(dataset=DatasetName.CC3M, folder=folder, check_images="none")
    return open_index(
        config, Path(FILE), Split.TRAIN, voken_text=voken_text(8), seed=0, count_tokens=lambda text: len(text)
    )


def _published_index(folder: Path) -> tuple[list[str], ...]:
    """Read the table, clean every caption, and return captions, paths, prompts, responses and tasks as lists."""
    import pandas as pd

    table = pd.read_csv(folder / FILE, sep="\t")
    captions: list[str] = []
    paths: list[str] = []
    sources: list[str] = []
    targets: list[str] = []
    tasks: list[str] = []
    for index, (_, row) in enumerate(table.iterrows()):
        text = _clean(row["caption"])
        picture = str(folder / row["image_path"])
        captions.append(text)
        paths.append(picture)
        sources.append(text)
        targets.append(f"{voken_text(8)} {prompts.STOP}")
        tasks.append("caption")
        if index % INSTRUCTION_EVERY == 0:
            captions.append(text)
            paths.append(picture)
            sources.append(prompts.cc3m_instruction(prompts.CC3M_GENERATION[0], text))
            targets.append(f"{voken_text(8)} {prompts.STOP}")
            tasks.append("instruction")
    return captions, paths, sources, targets, tasks


def _published_index_again(folder: Path) -> tuple[list[str], ...]:
    """Return the lists that the first start kept, in this run's own folder."""
    lists: tuple[list[str], ...] = pickle.loads((folder / KEPT).read_bytes())
    return lists


def _clean(text: str) -> str:
    text = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


def _write(folder: Path, rows: int, seed: int) -> None:
    rng = seeded(seed, "train", "rows")
    texts = [caption(random_scene(rng, "train"), rng) for _ in range(2000)]
    with (folder / FILE).open("w", encoding="utf-8") as file:
        file.write("caption\timage_path\n")
        for row in range(rows):
            file.write(f"{texts[row % 2000]} number {row}\ttrain/{row // 10_000:05d}/{row:09d}.jpg\n")


def _add_padding(report: Report) -> None:
    """Append the share of padded positions in batches of stories of one to five pictures."""
    rng = np.random.default_rng(report.settings.seed)
    pictures = rng.integers(0, 6, 5000)
    lengths = 30 + pictures * 60 + rng.integers(0, 40, 5000)

    def padding(bucketed: bool) -> float:
        sampler = EpochSampler(
            range(len(lengths)),  # type: ignore[arg-type]
            shuffle=True,
            lengths=lengths if bucketed else None,
            batch_size=BATCH_SIZE,
        )
        order = lengths[[number for _, number in sampler]]
        batches = order[: len(order) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
        return float(1 - batches.sum() / (batches.max(1).sum() * BATCH_SIZE))

    note = f"synthetic stories, batches of {BATCH_SIZE}; reference: data.bucket_by_length off"
    report.add("padded positions", "share", padding(False), padding(True), note=note)
