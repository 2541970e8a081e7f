"""Jobs that need each other, some at once; a job that fails stops only those that need it."""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minigpt5.tinyworld.experiments.work import run_logged
from minigpt5.tinyworld.workers import worker_pool

Outcome = Future[str | None]
"""Why a job failed, or None."""
Submit = Callable[[Callable[[], str | None]], Outcome]


@dataclass(frozen=True)
class Job:
    """Some work that can be done in another process."""

    key: str
    name: str
    work: Callable[[], None]
    log: Path
    needs: str | None = None
    """Key of the job that comes before, if that is to be done at all."""


class JobsInterrupted(KeyboardInterrupt):
    """The user stopped the jobs; ``failures`` has what had failed and what was being done."""

    def __init__(self, failures: dict[str, str]) -> None:
        super().__init__()
        self.failures = failures


def run_jobs(jobs: Sequence[Job], at_once: int) -> dict[str, str]:
    """Do every job, in order where there is a choice.

    Args:
        jobs: each behind the one it needs.
        at_once: processes; with one, everything runs in this process.

    Returns:
        Key of each job that was not done → why.

    Raises:
        JobsInterrupted: on Ctrl-C.
    """
    board = _Board(jobs, at_once)
    try:
        while board.waiting:
            with _workers(at_once) as submit:
                board.work_through(submit)
    except KeyboardInterrupt:
        stopped = dict.fromkeys(board.begun, "interrupted")
        raise JobsInterrupted({**board.failures, **stopped}) from None
    return board.failures


class _Board:
    """Which jobs wait, are begun, failed."""

    def __init__(self, jobs: Sequence[Job], at_once: int) -> None:
        self.waiting = {job.key: job for job in jobs}
        self.begun: dict[str, Job] = {}
        self.failures: dict[str, str] = {}
        self._running: dict[Outcome, str] = {}
        self._at_once, self._total, self._ended = at_once, len(jobs), 0

    def work_through(self, submit: Submit) -> None:
        """Do jobs until none is left, or a process died and took the others with it."""
        is_broken = False
        while self._running or (self.waiting and not is_broken):
            if not is_broken:
                self._begin(submit)
            for outcome in wait(self._running, return_when=FIRST_COMPLETED).done:
                is_broken |= isinstance(outcome.exception(), BrokenProcessPool)
                self._end(outcome)

    def _begin(self, submit: Submit) -> None:
        for key, job in list(self.waiting.items()):
            if len(self.begun) == self._at_once:
                return
            if job.needs in self.failures:
                self._close(self.waiting.pop(key), self.failures[job.needs])
            elif job.needs not in self.waiting and job.needs not in self.begun:
                self.begun[key] = self.waiting.pop(key)
                self._running[submit(partial(run_logged, job.log, job.work))] = key

    def _end(self, outcome: Outcome) -> None:
        job = self.begun.pop(self._running.pop(outcome))
        error = outcome.exception()
        failure = outcome.result() if error is None else f"its process ended ({error})"
        self._close(job, failure and f"{failure} (see {job.log})")

    def _close(self, job: Job, failure: str | None) -> None:
        self._ended += 1
        if failure:
            self.failures[job.key] = failure
        verdict = f"FAILED: {failure}" if failure else "done"
        print(f"[{self._ended}/{self._total}] {job.name}: {verdict}", file=sys.stderr, flush=True)


def _do_now(work: Callable[[], str | None]) -> Outcome:
    outcome: Outcome = Future()
    outcome.set_result(work())
    return outcome


@contextmanager
def _workers(at_once: int) -> Iterator[Submit]:
    if at_once == 1:
        yield _do_now
        return
    with worker_pool(at_once) as pool:
        yield pool.submit
