r"""Ask MiniGPT-5 from the command line and get text and pictures back.

Published usage, unchanged, from this folder::

    IS_STAGE2=True python3 playground.py --stage1_weight WEIGHT_FOLDER/stage1_cc3m.ckpt \
        --test_weight WEIGHT_FOLDER/stage2_vist.ckpt

Each reply is written as ``test_0.png`` … beside this file. Every flag of ``train_eval.py`` that chooses a model
or how it decodes works here too.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from minigpt4.errors import InputError  # noqa: E402
from minigpt5.arguments import parse_arguments, resolve_config  # noqa: E402
from minigpt5.cli import run_command  # noqa: E402

STORY = (
    "a small green diamond in the upper left on the beach .<Img><ImageHere></Img>"
    "then it goes to the middle .<Img><ImageHere></Img>\n Tell me the next scene with image."
)
STORY_PICTURES = (HERE / "story_0.png", HERE / "story_1.png")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the playground's own flags from those it shares with ``train_eval.py``."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="further flags: python train_eval.py --help",
    )
    parser.add_argument("--prompt", help="question; <ImageHere> marks where a picture belongs (default: a story)")
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="pictures, in the order of their marks")
    parser.add_argument("--replies", type=int, default=5, help="replies, each with its own seed (default: 5)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for test_0.png … (default: this one)")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> None:
    """Load the model, ask, and write one picture a reply.

    Raises:
        InputError: a flag, a file or a picture that cannot be used.
    """
    own, shared = parse(argv)
    config = resolve_config(parse_arguments(shared), os.environ)
    if config.test_weight is None:
        raise InputError("--test_weight: give the checkpoint to talk to")
    if own.images and own.prompt is None:
        raise InputError("--images: needs --prompt; without it the built-in story and its pictures are used")
    if own.replies < 1:
        raise InputError(f"--replies {own.replies}: give at least 1")
    try:
        own.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {own.out}: cannot be made a folder ({error.strerror}); name another") from None
    for path in own.images:
        if not path.is_file():
            raise InputError(f"--images {path}: no such file")

    from dataclasses import replace

    from minigpt5.conversation import Conversation
    from minigpt5.images import open_picture

    text, paths = (STORY, STORY_PICTURES) if own.prompt is None else (own.prompt, own.images)
    try:
        prompt = Conversation().ask(text, [open_picture(path) for path in paths])
    except ValueError as error:
        raise InputError(f"--prompt: {error}") from None

    from minigpt5.runs import open_model

    model = open_model(config)
    if not model.fits(prompt):
        raise InputError("--prompt: longer than the model can read (the tokenizer's model_max_length); shorten it")
    for number in range(own.replies):
        reply = model.generate([prompt], replace(config.generation, seed=config.generation.seed + number))[0]
        print(f"{number}: {reply.text or '(no text)'}")
        if reply.images:
            path = own.out / f"test_{number}.png"
            side_by_side(reply.images).save(path)
            print(f"   {path}")
        else:
            print("   (no picture; --force_image asks for one)")


def side_by_side(images: Sequence) -> "Image.Image":  # type: ignore[name-defined]  # noqa: F821
    """Join a reply's pictures to one row."""
    from PIL import Image

    row = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    return row


if __name__ == "__main__":
    sys.exit(run_command(main))
