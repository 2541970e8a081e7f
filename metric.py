"""Score predictions: ``python3 metric.py --test_weight stage1_cc3m.ckpt`` after train_eval.py has made them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from minigpt4.errors import InputError
from minigpt5.arguments import FlagParser, parse_assignment, unknown_flags
from minigpt5.cli import run_command
from minigpt5.config import load_config
from minigpt5.predictions import Prediction, read_predictions, run_folder

DATASETS = ("cc3m", "vist", "mmdialog")


def main(argv: Sequence[str]) -> None:
    """Read the prediction store, score it, and write results.json, results_dict.json and report.html into it."""
    parser = FlagParser(prog="metric.py", description=__doc__, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--test_weight", type=Path, help="checkpoint the predictions were made with")
    which.add_argument("--predictions", type=Path, help="prediction folder, instead of --test_weight")
    parser.add_argument("--config", type=Path, help="YAML file (default: MINIGPT5_CONFIG, else the paper's model)")
    parser.add_argument("--dataset", choices=DATASETS, help="suite of scores (default: the predictions' data set)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any configuration key")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an input error")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(unknown_flags(parser, unknown))
    if arguments.test_weight is None and arguments.predictions is None:
        raise InputError("give --test_weight (the checkpoint predictions were made with) or --predictions FOLDER")
    config = load_config(arguments.config, dict(map(parse_assignment, arguments.set)), os.environ)
    paths = config.paths
    folder = arguments.predictions or run_folder(paths.outputs, arguments.test_weight, paths.output_suffix)
    predictions = read_predictions(folder)
    dataset = arguments.dataset or dataset_of(predictions, folder)

    from minigpt5.metrics.report import format_value, possible, write_report
    from minigpt5.metrics.suites import score

    scores = score(dataset, predictions, folder, config.metrics, paths.cc3m or config.data.folder)
    for name, one in possible(scores.scores, scores).items():
        print(f"{name:36} {format_value(one.value):>9}   over {one.count} of {one.total} {one.unit}")
    for note in scores.notes:
        print(f"notice: {note}", file=sys.stderr)
    print(f"report: {write_report(folder, predictions, scores)}")


def dataset_of(predictions: Sequence[Prediction], folder: Path) -> str:
    """Return the one data set that the predictions are of; InputError if there is none or more than one."""
    names = sorted({prediction.dataset for prediction in predictions})
    if len(names) != 1:
        found = ", ".join(names) or "no predictions"
        raise InputError(f"{folder}: holds {found}; predict with train_eval.py, or choose with --dataset")
    return names[0]


if __name__ == "__main__":
    sys.exit(run_command(main))
