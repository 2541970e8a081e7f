"""Command line of the tiny world: ``python -m minigpt5.tinyworld {data,init}``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from minigpt4.errors import InputError
from minigpt5.cli import run_command

DATA_SETS = ("cc3m", "vist", "mmdialog")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; nothing heavy is imported for it."""
    parser = argparse.ArgumentParser(
        prog="python -m minigpt5.tinyworld",
        description="Make the tiny world's data sets and its models.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an input error")
    commands = parser.add_subparsers(dest="command", required=True)

    data = commands.add_parser("data", help="write data sets in the published layouts")
    data.add_argument("--out", type=Path, required=True, help="folder for CC3M/, VIST/ and MMDialog/")
    data.add_argument("--train", type=int, default=0, help="training records of each data set (default: 0)")
    data.add_argument("--val", type=int, default=0, help="held-out validation records (default: 0)")
    data.add_argument("--test", type=int, default=0, help="held-out MMDialog test records (default: 0)")
    data.add_argument("--datasets", nargs="+", choices=DATA_SETS, default=DATA_SETS, help="default: all")
    data.add_argument("--seed", type=int, default=0)
    data.set_defaults(run=_data)

    init = commands.add_parser("init", help="write randomly initialised models in the published layouts")
    init.add_argument("--out", type=Path, required=True, help="folder for the weights")
    init.add_argument("--seed", type=int, default=0)
    init.set_defaults(run=_init)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run one command.

    Raises:
        InputError: the arguments cannot be used.
    """
    options = build_parser().parse_args(arguments)
    options.run(options)


def _data(options: argparse.Namespace) -> None:
    from minigpt5.tinyworld.datasets import Sizes, write_datasets

    sizes = Sizes(options.train, options.val, options.test)
    written = write_datasets(_folder(options.out), sizes, options.seed, tuple(options.datasets))
    if not written:
        raise InputError("nothing to write; give --train or --val (for MMDialog also --test) a number of records")
    for path, count in written.items():
        print(f"{path}: {count} records")


def _init(options: argparse.Namespace) -> None:
    from minigpt5.tinyworld.foundations import write_foundations

    for path, size in write_foundations(_folder(options.out), options.seed).items():
        print(f"{path}: {size / 1024:.0f} KiB")


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be made a folder ({error.strerror}); give another") from None
    return path


if __name__ == "__main__":
    sys.exit(run_command(main))
