"""Processes that work beside each other."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from minigpt5.tinyworld.workers import worker_pool

PARENT = """
import os, time
from minigpt5.tinyworld.workers import worker_pool

if __name__ == "__main__":
    with worker_pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""

POOL = """
import os, time
from minigpt5.tinyworld.workers import worker_pool

def nap(_):
    time.sleep(0.2)
    return os.getpid()

if __name__ == "__main__":
    with worker_pool(2) as pool:
        workers = set()
        while len(workers) < 2:
            workers |= set(pool.map(nap, range(2)))
        busy = pool.submit(time.sleep, 600)
        time.sleep(0.5)
        print(*workers, flush=True)
        busy.result()
"""
QUIET = """
from minigpt5.tinyworld.workers import worker_pool

def load():
    import peft

if __name__ == "__main__":
    with worker_pool(1) as pool:
        pool.submit(load).result()
"""
JOBS = """
import os, sys, time
from functools import partial
from pathlib import Path
from minigpt5.tinyworld.experiments.jobs import Job, JobsInterrupted, run_jobs

def work(folder):
    (folder / "worker").write_text(str(os.getpid()))
    (folder / "worker").rename(folder / "worker.txt")
    time.sleep(600)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        run_jobs([Job("a", "job a", partial(work, folder), folder / "a.log")], 2)
    except JobsInterrupted as stopped:
        print(stopped.failures, flush=True)
        raise
"""


def test_workers_share_the_threads():
    with worker_pool(2) as pool:
        assert pool.submit(torch.get_num_threads).result() == max(1, torch.get_num_threads() // 2)


def test_a_busy_worker_ends_when_its_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_alive(worker)
        parent.send_signal(signal.SIGKILL)
    assert ends(worker)


@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["to the group", "to the parent alone"])
def test_ctrl_c_ends_busy_and_idle_workers(tmp_path, send):
    with started(tmp_path, POOL) as parent:
        assert parent.stdout is not None
        workers = [int(worker) for worker in parent.stdout.readline().split()]
        send(parent.pid, signal.SIGINT)
        parent.communicate(timeout=60)
    assert parent.returncode == -signal.SIGINT
    assert len(workers) == 2 and all(ends(worker) for worker in workers)


def test_ctrl_c_tells_which_jobs_were_being_done(tmp_path):
    begun = tmp_path / "worker.txt"
    with started(tmp_path, JOBS) as parent:
        deadline = time.monotonic() + 300
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(parent.pid, signal.SIGINT)
        told, _ = parent.communicate(timeout=60)
    assert told == "{'a': 'interrupted'}\n"
    assert ends(int(begun.read_text()))


def test_an_error_waits_for_no_other_worker():
    with pytest.raises(ZeroDivisionError), worker_pool(2) as pool:
        pool.submit(time.sleep, 0).result()
        start = time.monotonic()
        pool.submit(time.sleep, 600)
        pool.submit(divmod, 1, 0).result()
    assert time.monotonic() - start < 60


@contextmanager
def started(folder: Path, text: str) -> Iterator[subprocess.Popen[str]]:
    """A Python script in a process group of its own, as a terminal gives it; nothing of the group stays."""
    script = folder / "parent.py"
    # Where tests run in the background, SIGINT may be ignored, and children inherit that.
    script.write_text("import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n" + text)
    parent = subprocess.Popen(
        [sys.executable, script, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        start_new_session=True,
    )
    try:
        yield parent
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()


def ends(process: int) -> bool:
    deadline = time.monotonic() + 60
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(process)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    # Where nobody asks how an orphan ended, it stays as a zombie.
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_libraries_for_other_runs_say_nothing_in_a_worker(tmp_path):
    """bitsandbytes, which peft imports, has a word for some processors."""
    script = tmp_path / "quiet.py"
    script.write_text(QUIET)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
