"""``python -m minigpt5.data.prepare {cc3m,vist,features}``."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from minigpt5.cli import run_command
from minigpt5.config import load_config
from minigpt5.data.prepare.cc3m import write_cc3m
from minigpt5.data.prepare.vist import write_vist


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m minigpt5.data.prepare", description="Prepare data sets.")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True)
    cc3m = commands.add_parser("cc3m", help="img2dataset folder → tab-separated file")
    cc3m.add_argument("--images", type=Path, required=True, help="img2dataset output, e.g. datasets/CC3M/train")
    cc3m.add_argument("--out", type=Path, required=True, help="e.g. datasets/CC3M/cc3m_train.tsv")
    vist = commands.add_parser("vist", help="official annotations → stories and picture mapping")
    vist.add_argument("--annotations", type=Path, required=True, help="e.g. val.story-in-sequence.json")
    vist.add_argument("--images", type=Path, required=True, help="e.g. datasets/VIST/val_images")
    vist.add_argument("--out", type=Path, required=True, help="data folder, e.g. datasets/VIST")
    vist.add_argument("--split", default="val", choices=("train", "val", "test"))
    features = commands.add_parser("features", help="VAE moments of a CC3M file's pictures")
    features.add_argument("--config", type=Path, help="the run's YAML file: VAE and picture size")
    features.add_argument("--data", type=Path, required=True, help="CC3M file, relative to DATAFOLDER")
    features.add_argument("--out", type=Path, required=True, help="feature folder (PREPROCESS_FEATURE_FOLDER)")
    features.add_argument("--batch_size", type=int, default=16)
    features.add_argument("--device", default="cpu", help="e.g. cuda")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Run one preparation."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse(argv)
    if arguments.command == "cc3m":
        count, what = write_cc3m(arguments.images, arguments.out), "rows"
    elif arguments.command == "vist":
        count, what = (
            write_vist(arguments.annotations, arguments.images, arguments.out, arguments.split),
            "stories",
        )
    else:
        # Imported here because diffusers takes seconds, which --help and the other commands need not wait for.
        from minigpt5.data.prepare.features import write_features

        config = load_config(arguments.config, {}, os.environ)
        count = write_features(
            config, arguments.data, arguments.out, batch_size=arguments.batch_size, device=arguments.device
        )
        what = "pictures"
    print(f"{arguments.out}: {count} {what} written")


if __name__ == "__main__":
    sys.exit(run_command(main))
