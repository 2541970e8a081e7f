"""From a data file to samples: which reader, which samples, which of them can be used."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from minigpt4.errors import InputError
from minigpt5.config import DataConfig, DatasetName
from minigpt5.data.cc3m import is_cc3m_header, read_cc3m
from minigpt5.data.feature_cache import FeatureFolder
from minigpt5.data.index import ReadOptions, SelectedSamples
from minigpt5.data.mmdialog import read_mmdialog
from minigpt5.data.pictures import PictureChecker
from minigpt5.data.types import Problem, Sample, SampleIndex, Split
from minigpt5.data.vist import read_vist
from minigpt5.prompts import HashedChoice

logger = logging.getLogger(__name__)

Reader = Callable[[Path, ReadOptions], SampleIndex]

READERS: dict[DatasetName, Reader] = {
    DatasetName.CC3M: read_cc3m,
    DatasetName.VIST: read_vist,
    DatasetName.MMDIALOG: read_mmdialog,
}
LAYOUTS = """  cc3m      tab-separated, first line names the columns caption and image_path
  vist      JSON object of story id → steps, named *cleaned*.json, with *image_mapping*.json beside it
  mmdialog  one JSON object a line with conversation_id and conversation"""

_HEAD_BYTES = 1 << 16
_HEAD_RECORDS = 1 << 20
_CHUNK = 4096
_SHOWN_PROBLEMS = 10


_CONVERSATION = re.compile(rb'"conversation(_id)?"\s*:')


def detect_dataset(path: Path) -> DatasetName:
    """Return which layout a data file has, from its content and, failing that, its suffix.

    Raises:
        InputError: the file is missing or has none of the layouts.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    first = next((line for line in head.splitlines() if line.strip()), b"")
    if is_cc3m_header(first) or path.suffix == ".tsv":
        return DatasetName.CC3M
    if _CONVERSATION.search(first) or path.suffix in (".txt", ".jsonl"):
        return DatasetName.MMDIALOG
    if first.lstrip().startswith(b"{") or path.suffix == ".json":
        return DatasetName.VIST
    raise InputError(f"{path}: not a known layout; known are\n{LAYOUTS}")


def open_index(
    config: DataConfig,
    path: Path,
    split: Split,
    *,
    voken_text: str,
    seed: int,
    count_tokens: Callable[[str], int],
    find_cut: Callable[[Sample], str | None] | None = None,
    features: FeatureFolder | None = None,
) -> SelectedSamples:
    """Index a data file and leave out what cannot be used, naming it.

    Args:
        config: ``max_samples`` takes the first samples before pictures are checked.
        path: relative to ``config.folder``, as published.
        split: what the samples are for.
        voken_text: one run of vokens.
        seed: of the prompt choice.
        count_tokens: length of a text in language-model tokens.
        find_cut: returns why a sample is too long for the tokenizer's limit, or None.
        features: precomputed features; pictures then need a feature file and are not opened.

    Raises:
        InputError: the file is missing, of another layout or without the wanted context, or has no usable sample.
    """
    full, name = _locate(config, path)
    index = READERS[name](full, _read_options(config, split, voken_text, seed, count_tokens))
    count = len(index) if config.max_samples is None else min(config.max_samples, len(index))
    checker = PictureChecker(config.check_images, full.with_name(f".{full.name}.pictures.json"))

    def find_faults(samples: Sequence[Sample]) -> Iterator[str | None]:
        for sample, fault in zip(samples, _picture_faults(samples, checker, features), strict=True):
            yield fault if fault is not None or find_cut is None else find_cut(sample)

    selected = _select(index, count, full, find_faults)
    checker.save()
    report_problems(full, len(selected), selected.problems)
    return selected


def check_records(config: DataConfig, path: Path, split: Split, *, voken_text: str) -> None:
    """Raise what :func:`open_index` would raise for a file's layout and records, without a tokenizer.

    Nothing is read beyond the first usable record and the mebibyte around it, unless there is none in it.
    Pictures and lengths are not looked at.

    Raises:
        InputError: as :func:`open_index`.
    """
    full, name = _locate(config, path)
    options = _read_options(config, split, voken_text, seed=0, count_tokens=lambda text: 0)
    if len(READERS[name](full, replace(options, head_bytes=_HEAD_RECORDS))) == 0:
        index = READERS[name](full, options)
        if len(index) == 0:
            report_problems(full, 0, index.problems)


def _locate(config: DataConfig, path: Path) -> tuple[Path, DatasetName]:
    """Return a data file's path and data set, if it is there and suits the settings."""
    full = config.folder / path
    if not full.is_file():
        raise InputError(f"{full}: no such data file (data paths are relative to the data folder, DATAFOLDER)")
    name = detect_dataset(full) if config.dataset is DatasetName.AUTO else config.dataset
    if config.context != "full" and name is not DatasetName.VIST:
        raise InputError(
            f"data.context: {config.context}: only VIST's prompts hold a story so far, and {full} is of {name}; "
            "leave it at full"
        )
    return full, name


def _read_options(
    config: DataConfig, split: Split, voken_text: str, seed: int, count_tokens: Callable[[str], int]
) -> ReadOptions:
    return ReadOptions(
        split=split,
        folder=config.folder,
        voken_text=voken_text,
        choose=HashedChoice(seed),
        count_tokens=count_tokens,
        tasks=config.tasks,
        context=config.context,
    )


def _select(
    index: SampleIndex, count: int, path: Path, find_faults: Callable[[Sequence[Sample]], Iterable[str | None]]
) -> SelectedSamples:
    """Keep the faultless of the first ``count`` samples and number repeated ids."""
    problems = list(index.problems)
    kept: list[int] = []
    renamed: dict[int, str] = {}
    # Hashes, as millions of ids are large; a false match would only add a number to an id.
    seen: Counter[int] = Counter()
    for start in range(0, count, _CHUNK):
        positions = range(start, min(start + _CHUNK, count))
        samples = [index[position] for position in positions]
        for position, sample, reason in zip(positions, samples, find_faults(samples), strict=True):
            if reason is not None:
                problems.append(Problem(f"{path}: {sample.id}", reason))
                continue
            kept.append(position)
            seen[hash(sample.id)] += 1
            if seen[hash(sample.id)] > 1:
                renamed[position] = f"{sample.id}.{seen[hash(sample.id)]}"
    return SelectedSamples(index, np.array(kept, dtype=np.int64), problems, renamed)


def report_problems(path: Path, usable: int, problems: Sequence[Problem]) -> None:
    """Log how much of a data file is usable and name the first records left out.

    Raises:
        InputError: nothing is usable.
    """
    shown = [f"  {problem.source}: {problem.reason}" for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        shown.append(f"  and {len(problems) - _SHOWN_PROBLEMS} more")
    if usable == 0:
        raise InputError("\n".join([f"{path}: no usable sample", *shown]))
    if problems:
        lines = "\n".join(shown)
        logger.warning("%s: %d samples; %d records left out\n%s", path, usable, len(problems), lines)
    else:
        logger.info("%s: %d samples", path, usable)


def write_problems(problems: Sequence[Problem], path: Path) -> None:
    """Write every record left out as a JSON line; with none, an earlier run's file is removed."""
    if not problems:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps({"source": p.source, "reason": p.reason}, ensure_ascii=False) for p in problems]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _picture_faults(
    samples: Sequence[Sample], checker: PictureChecker, features: FeatureFolder | None
) -> list[str | None]:
    """Return for each sample its first picture, or feature file in its place, that cannot be used."""
    if features is not None:
        return [_first(_feature_faults(sample, features)) for sample in samples]
    faults = checker.check(path for sample in samples for path in sample.input_images + sample.output_images)
    return [_first(faults.get(path) for path in sample.input_images + sample.output_images) for sample in samples]


def _feature_faults(sample: Sample, features: FeatureFolder) -> Iterator[str | None]:
    yield from (features.fault("input", path) for path in sample.input_images)
    yield from (features.fault("output", path) for path in sample.output_images)


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)
