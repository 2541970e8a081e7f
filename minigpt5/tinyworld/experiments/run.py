"""The command: find what is missing, do it, and write the report."""

import fcntl
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from minigpt4.errors import InputError
from minigpt5.tinyworld.experiments.comparisons import COMPARISONS, Comparison, Sizes
from minigpt5.tinyworld.experiments.jobs import Job, JobsInterrupted, run_jobs
from minigpt5.tinyworld.experiments.plan import Cell, Plan, Prediction, write_data
from minigpt5.tinyworld.experiments.report import write_report
from minigpt5.tinyworld.experiments.work import measure_cells, train

FAILED = 1
"""Exit code."""


def run_experiments(
    folder: Path,
    names: Sequence[str],
    *,
    sizes: Sizes,
    command: str,
    seeds: int | None = None,
    jobs: int = 1,
    comparisons: Mapping[str, Comparison] = COMPARISONS,
) -> int:
    """Run comparisons, those cells that have no valid result yet, and write the report of all that have one.

    Args:
        folder: for data, checkpoints, predictions, results and report; made if missing.
        names: comparisons to run; empty: all.
        sizes: of data and trainings.
        command: shown in the report.
        seeds: replaces every comparison's own number of seeds.
        jobs: trainings and predictions at once.
        comparisons: what the names stand for.

    Returns:
        0, or 1 if a cell has no result.

    Raises:
        InputError: an unknown name, or another program works in the folder.
        KeyboardInterrupt: on Ctrl-C, after the report of what is there.
    """
    if unknown := sorted(set(names) - set(comparisons)):
        raise InputError(f"--only {' '.join(unknown)}: no such comparison; there are {', '.join(comparisons)}")
    plan = Plan(folder.resolve(), sizes)
    with alone_in(plan.folder):
        wanted = [comparison for name, comparison in comparisons.items() if not names or name in names]
        cells = {one.name: plan.cells(one, seeds or one.seeds) for one in wanted}
        waiting = [cell for group in cells.values() for cell in group if cell.result() is None]
        total = sum(map(len, cells.values()))
        print(f"{total} cells, {total - len(waiting)} of them there already", file=sys.stderr)
        failures: dict[str, str] = {}
        interruption: JobsInterrupted | None = None
        if waiting:
            write_data(plan)
            try:
                failures = run_jobs(plan_jobs(waiting, plan.folder / "logs"), jobs)
            except JobsInterrupted as error:
                failures, interruption = error.failures, error
        missing = {
            cell.name: failures.get(cell.prediction.key, "not run") for cell in waiting if cell.result() is None
        }
        # What earlier calls found is shown too.
        shown = {
            one.name: plan.cells(one, max(seeds or 0, one.seeds, plan.seeds_done(one)))
            for one in comparisons.values()
        }
        report = write_report(plan.folder, shown, list(comparisons.values()), sizes, command, missing)
        print(f"report: {report}")
        for name, reason in missing.items():
            print(f"no result: {name}: {reason}", file=sys.stderr)
        if interruption is not None:
            raise interruption
        return FAILED if missing else 0


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other programs out of a folder meanwhile: two would remove each other's half-done trainings."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"--out {folder}: experiments are running there; wait for them, or give another folder"
            raise InputError(message) from None
        yield


def plan_jobs(cells: Sequence[Cell], logs: Path) -> list[Job]:
    """Return the jobs that cells need, each once, however many cells share it, and behind what it needs."""
    jobs: dict[str, Job] = {}
    groups: dict[str, list[Cell]] = {}
    predictions: dict[str, Prediction] = {}
    for cell in cells:
        groups.setdefault(cell.prediction.key, []).append(cell)
        predictions[cell.prediction.key] = cell.prediction
    for key, prediction in predictions.items():
        chain = [prediction.training]
        while chain[0].start is not None:
            chain.insert(0, chain[0].start)
        before: str | None = None
        for training in chain:
            # What starts from a stage that is trained anew is trained anew too.
            if before is not None or not training.checkpoint.is_file():
                job = Job(
                    training.key, training.name, partial(train, training), logs / f"{training.key}.log", before
                )
                before = jobs.setdefault(training.key, job).key
        work = partial(measure_cells, prediction, groups[key], is_new=before is not None)
        name = "; ".join(cell.name for cell in groups[key])
        jobs[key] = Job(key, name, work, logs / f"{key}.log", before)
    return list(jobs.values())
