"""``python -m minigpt5.checkpoint {show,convert,strip}``; imports nothing heavy before the flags are known."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

MAX_VOKENS = 64


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(prog="python -m minigpt5.checkpoint", description=main.__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an input error")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what a checkpoint holds")
    show.add_argument("source", type=Path)
    conversion = commands.add_parser("convert", help="between the published layout and ours")
    conversion.add_argument("source", type=Path)
    conversion.add_argument("target", type=Path)
    conversion.add_argument("--to", choices=("ours", "published"), required=True)
    conversion.add_argument("--language_model", type=Path, help="LLaMA folder that holds the frozen rows")
    conversion.add_argument("--stage1", type=Path, help="stage-1 checkpoint that holds the frozen rows")
    stripping = commands.add_parser("strip", help="weights of a Lightning checkpoint alone")
    stripping.add_argument("source", type=Path)
    stripping.add_argument("target", type=Path)
    for command in (show, conversion, stripping):
        command.add_argument("--vokens", type=_parse_count, default=8, help="vokens a picture (default 8)")
    return parser


def _parse_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_VOKENS:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MAX_VOKENS}, found {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Look into checkpoints, convert them between the layouts, strip training state off them."""
    arguments = build_parser().parse_args(argv)
    from minigpt5.checkpoint import convert, read_checkpoint, strip
    from minigpt5.checkpoint_layouts import check_voken_count, keeps_training_state

    new_tokens = arguments.vokens + 1
    if arguments.command == "show":
        checkpoint = read_checkpoint(arguments.source, new_tokens)
        check_voken_count(checkpoint)
    elif arguments.command == "strip":
        checkpoint = strip(arguments.source, arguments.target, new_tokens)
    else:
        checkpoint = convert(
            arguments.source,
            arguments.target,
            to=arguments.to,
            new_tokens=new_tokens,
            language_model=arguments.language_model,
            stage1=arguments.stage1,
        )
    print(f"{checkpoint.path}: {checkpoint.layout} layout, {checkpoint.stage} stage")
    groups: dict[str, list[int]] = {}
    for key, value in checkpoint.tensors.items():
        groups.setdefault(re.sub(r"\.\d+\..*", "", key), []).append(value.numel())
    for name, sizes in groups.items():
        print(f"  {name}: {len(sizes)} tensors, {sum(sizes):,} values")
    if arguments.command == "convert" and not keeps_training_state(checkpoint, arguments.to):
        print(
            f"left out of {arguments.target}: the optimizer state, which is of the {checkpoint.layout} layout's "
            "parameters; a training is resumed from a checkpoint of the code that wrote it"
        )
