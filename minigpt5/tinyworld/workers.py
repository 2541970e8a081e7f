"""Processes that work beside each other, for trainings too small to use every core."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def worker_pool(at_once: int) -> ProcessPoolExecutor:
    """Return a pool of processes that share this one's threads, and end when it ends, however it does.

    Args:
        at_once: processes.
    """
    import torch

    threads = max(1, torch.get_num_threads() // at_once)
    # Forking would copy this process's threads half-alive.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(at_once, context, _begin, (threads,))


def _begin(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the parent's end: one that is killed cannot tell its workers, which would go on for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
