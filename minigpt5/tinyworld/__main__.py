"""Command line of the tiny world: ``python -m minigpt5.tinyworld COMMAND``; ``--help`` lists the commands."""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt4.errors import InputError
from minigpt5.cli import run_command
from minigpt5.tinyworld.experiments.comparisons import COMPARISONS, Sizes

DATA_SETS = ("cc3m", "vist", "mmdialog")
PARTS = ("vae", "clip", "text", "language", "unet", "blanks", "accord", "sight", "eyes", "vision", "scorer")
MEASURED = ("vae", "unet", "vision", "scorer")
"""Parts with a floor of their own."""
SHIPPED = Path(__file__).resolve().parent / "weights"
FLOORS_NOT_MET = 1
"""Exit code."""


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
    _add_pretraining(commands)
    _add_experiments(commands)
    return parser


def _add_pretraining(commands: Any) -> None:
    pretrain = commands.add_parser(
        "pretrain",
        help="train the models from scratch",
        description="Train the tiny models from scratch. The same command continues a killed run.",
    )
    pretrain.add_argument("--out", type=Path, required=True, help="folder for the weights and the checkpoints")
    pretrain.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.add_argument("--scale", type=float, default=1.0, help="multiply every part's steps (default: 1)")
    pretrain.add_argument("--pictures", type=int, default=12_000, help="pictures rendered for training")
    pretrain.add_argument(
        "--jobs", type=int, help="parts at once (default: 2 on a CPU with several cores, else 1)"
    )
    pretrain.set_defaults(run=_pretrain)

    evaluate = commands.add_parser("evaluate", help="measure the models against their floors")
    evaluate.add_argument("--weights", type=Path, default=SHIPPED, help="folder (default: the shipped one)")
    evaluate.add_argument("--parts", nargs="+", choices=MEASURED, default=MEASURED, help="default: all")
    evaluate.add_argument(
        "--count", type=int, default=300, help="held-out pictures, a multiple of 100 (default: 300)"
    )
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.set_defaults(run=_evaluate)

    score = commands.add_parser("score", help="measure replies over tiny-world data against their floors")
    score.add_argument(
        "folders", type=Path, nargs="+", help="folders of predictions, as train_eval.py writes them"
    )
    score.add_argument("--page", type=Path, help="also write an HTML page with these shares and some replies")
    score.add_argument("--check", action="store_true", help="exit with 1 if a floor is not reached")
    score.set_defaults(run=_score)


def _add_experiments(commands: Any) -> None:
    sizes = Sizes()
    experiments = commands.add_parser(
        "experiments",
        help="rerun the paper's comparisons",
        description="Train and measure every variant of the paper's comparisons, and write results.md with tables "
        "and plots. The same command goes on where it stopped; what changed is done again.",
    )
    experiments.add_argument("--out", type=Path, required=True, help="folder for everything it writes")
    experiments.add_argument(
        "--only", nargs="+", choices=COMPARISONS, default=(), metavar="NAME", help=f"of {', '.join(COMPARISONS)}"
    )
    experiments.add_argument("--seeds", type=int, help="trainings of each variant (default: 3 or 1)")
    experiments.add_argument("--jobs", type=int, default=1, help="trainings at once (default: 1)")
    experiments.add_argument(
        "--steps", type=int, nargs="+", default=sizes.steps, metavar="N",
        help=f"optimizer steps of stage 1 and of stage 2, or of each (default: {' '.join(map(str, sizes.steps))})",
    )  # fmt: skip
    for name, what in (
        ("captions", "captioned pictures to train stage 1 on"),
        ("stories", "stories to train stage 2 on"),
        ("held_out", "held-out pictures to measure on"),
    ):
        default = getattr(sizes, name)
        experiments.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    experiments.set_defaults(run=_experiments)


def main(arguments: Sequence[str]) -> int:
    """Run one command and return the exit code.

    Raises:
        InputError: the arguments cannot be used.
    """
    options = build_parser().parse_args(arguments, argparse.Namespace(arguments=arguments))
    return options.run(options) or 0


def _data(options: argparse.Namespace) -> None:
    from minigpt5.tinyworld.datasets import Sizes, write_datasets

    sizes = Sizes(options.train, options.val, options.test)
    written = write_datasets(_folder(options.out), sizes, options.seed, tuple(options.datasets))
    if not written:
        raise InputError("nothing to write; give --train or --val (for MMDialog also --test) a number of records")
    for path, count in written.items():
        print(f"{path}: {count} records")


def _init(options: argparse.Namespace) -> None:
    from minigpt5.tinyworld.foundations import refuse_models, write_foundations

    refuse_models(options.out)
    for path, size in write_foundations(_folder(options.out), options.seed).items():
        print(f"{path}: {size / 1024:.0f} KiB")


def _pretrain(options: argparse.Namespace) -> int:
    if not 0 < options.scale < math.inf or options.pictures < 1:
        raise InputError(f"--scale {options.scale} --pictures {options.pictures}: give finite numbers above 0")
    if options.jobs is not None and options.jobs < 1:
        raise InputError(f"--jobs {options.jobs}: give at least 1")
    import torch

    from minigpt5.tinyworld.pretraining.loop import Place
    from minigpt5.tinyworld.pretraining.run import pretrain

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    jobs = options.jobs or (2 if device.type == "cpu" and torch.get_num_threads() > 1 else 1)
    place = Place(_folder(options.out), options.seed, device)
    pretrain(options.parts, place, options.scale, options.pictures, jobs)
    if rest := [part for part in PARTS if part in options.parts and part not in MEASURED]:
        print(f"no floor of their own: {', '.join(rest)}")
    measured = [part for part in MEASURED if part in options.parts]
    return _report(options.out, measured, 300, options.seed) if measured else 0


def _evaluate(options: argparse.Namespace) -> int:
    if options.count < 1 or options.count % 100:
        raise InputError(f"--count {options.count}: give a multiple of 100")
    if not options.weights.is_dir():
        raise InputError(f"--weights {options.weights}: no such folder")
    return _report(options.weights, options.parts, options.count, options.seed)


def _score(options: argparse.Namespace) -> int:
    from minigpt5.tinyworld.quality import Share, score_folder

    if options.page:
        _folder(options.page.parent, "--page")
        if options.page.is_dir():
            raise InputError(f"--page {options.page}: is a folder; name a file")
    scored: dict[Path, list[Share]] = {}
    for folder in options.folders:
        print(f"{folder}:")
        scored[folder] = score_folder(folder)
        for share in scored[folder]:
            print(f"  {share}", flush=True)
    missed = [f"{folder}: {share.name}" for folder, shares in scored.items() for share in shares if not share.met]
    if options.page:
        from minigpt5.tinyworld.overview import write_overview

        write_overview(options.page, scored)
    if missed:
        print(f"floors not met or not measured: {'; '.join(missed)}", file=sys.stderr)
    return FLOORS_NOT_MET if missed and options.check else 0


def _experiments(options: argparse.Namespace) -> int:
    numbers = {name: getattr(options, name) for name in ("seeds", "jobs", "captions", "stories", "held_out")}
    for name, number in [*numbers.items(), *(("steps", steps) for steps in options.steps)]:
        if number is not None and number < 1:
            raise InputError(f"--{name} {number}: give at least 1")
    if len(options.steps) > 2:
        raise InputError(f"--steps {' '.join(map(str, options.steps))}: give one or two numbers")
    from minigpt5.tinyworld.experiments.run import run_experiments

    sizes = Sizes(options.captions, options.stories, options.held_out, (options.steps[0], options.steps[-1]))
    command = f"python -m minigpt5.tinyworld {shlex.join(options.arguments)}"
    folder = _folder(options.out)
    return run_experiments(
        folder, options.only, sizes=sizes, command=command, seeds=options.seeds, jobs=options.jobs
    )


def _report(folder: Path, parts: Sequence[str], count: int, seed: int) -> int:
    from minigpt5.tinyworld.pretraining.evaluate import evaluate

    measures = evaluate(folder, parts, count, seed)
    print(f"measured on {count} held-out pictures, {folder}:")
    missed = []
    for measure in measures:
        print(measure, flush=True)
        missed += [] if measure.met else [measure.name]
    if missed:
        print(f"floors not met: {'; '.join(missed)}", file=sys.stderr)
    return FLOORS_NOT_MET if missed else 0


def _folder(path: Path, flag: str = "--out") -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be made a folder ({error.strerror}); give another") from None
    return path


if __name__ == "__main__":
    sys.exit(run_command(main))
