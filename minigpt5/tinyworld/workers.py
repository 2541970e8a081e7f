"""Processes that work beside each other, for trainings too small to use every core."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from minigpt5.cli import quieten_libraries


@contextmanager
def worker_pool(at_once: int) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of processes that share this one's threads, and end when it ends, however it does.

    An exception, Ctrl-C among them, ends them at once, whatever they are doing.

    Args:
        at_once: processes.
    """
    import torch

    threads = max(1, torch.get_num_threads() // at_once)
    others = set(multiprocessing.active_children())
    # Forking would copy this process's threads half-alive.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(at_once, context, _begin, (threads,))
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise


def _begin(threads: int) -> None:
    # Ctrl-C reaches the whole process group; a worker that it ends while idle would block the pool's exit.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quieten_libraries()
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the parent's end: one that is killed cannot tell its workers, which would go on for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
