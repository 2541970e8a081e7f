"""Measure the reference path against ours: ``python benchmarks/run.py --suite train --preset mid``.

Prints a table and writes ``benchmarks/results/<date>-<suite>-<preset>-<device>.json``.
"""

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from minigpt4.errors import InputError  # noqa: E402  found by the line above
from minigpt5.cli import run_command  # noqa: E402

SUITES = ("train", "generate", "load", "data", "metric")
PRESETS = ("tiny", "mid", "7b")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--preset", choices=PRESETS, default="mid", help="mid is CPU-sized; 7b needs a GPU")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="counted rounds, of which medians are reported; data runs half as many, load one",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="default: the GPU if there is one")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: one a core)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    for name in ("repeats", "threads"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise InputError(f"--{name} {number}: give at least 1")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {arguments.out}: cannot be made a folder ({error.strerror})") from None
    threads = arguments.threads or _cores()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    from benchmarks import harness
    from minigpt5.devices import open_device
    from minigpt5.hardware import set_up_gpus

    torch.set_num_threads(threads)
    device = open_device(arguments.device, "--device")
    if device.type == "cuda":
        set_up_gpus()
    if arguments.preset == "7b" and device.type == "cpu" and arguments.suite not in ("load", "data", "metric"):
        raise InputError("--preset 7b: needs a GPU; on a CPU take --preset mid")
    failed = []
    for suite in SUITES if arguments.suite == "all" else (arguments.suite,):
        module = importlib.import_module(f"benchmarks.{suite}")
        settings = harness.Settings(suite, arguments.preset, arguments.repeats, arguments.seed, device, threads)
        if arguments.alone:
            print(json.dumps(module.measure_alone(settings, arguments.alone)))
            continue
        try:
            report = module.measure(settings)
        except Exception as error:
            if arguments.suite != "all":
                raise
            traceback.print_exception(error)  # the other suites' results are not lost
            failed.append(suite)
            continue
        harness.print_table(report)
        print(f"  {harness.write_json(report, arguments.out)}")
    if failed:
        sys.exit(f"error: --suite all: {' and '.join(failed)} failed, as told above")


if __name__ == "__main__":
    sys.exit(run_command(main))
