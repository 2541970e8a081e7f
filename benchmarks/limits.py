"""What a machine does at best, measured: multiplying matrices and moving memory; and what a call asks of it."""

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices that are multiplied."""
COPIED = {"cpu": 2**28, "cuda": 2**32}
"""Bytes of the block that is copied: far more than any cache holds."""
ROUNDS = 10


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of a product of large matrices, the best of :data:`ROUNDS`; two FLOP a multiply-add."""
    side = SIDE[device.type]
    first, second = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: first @ second, device)


def bandwidth(device: torch.device) -> float:
    """Return bytes/s of the device's memory, read and written by a copy, the best of :data:`ROUNDS`."""
    source = torch.empty(COPIED[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def flop_of(run: Callable[[], object]) -> int:
    """Return the FLOP of one call, backward passes included, as torch's counter sees them.

    It does not see those of fused attention on a CPU, a few in a hundred of a step.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
