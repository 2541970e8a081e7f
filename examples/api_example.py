"""MiniGPT-5 from Python, in the length of a notebook cell: ``python examples/api_example.py``.

Runs on a CPU with the tiny preset and its bundled checkpoints; another configuration is the only change for the
paper's model.
"""

import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from minigpt5.config import load_config  # noqa: E402
from minigpt5.conversation import Conversation  # noqa: E402
from minigpt5.images import open_picture  # noqa: E402
from minigpt5.runs import open_model  # noqa: E402

BUNDLED = HERE.parent / "minigpt5" / "tinyworld" / "weights" / "checkpoints"


def main() -> None:
    """Ask twice: the second question builds on the first answer and its picture."""
    config = load_config(Path("config/tiny.yaml"), {"stage": "multimodal"}, {})
    # By path: a name alone is looked for in weights/ first, where the paper's checkpoints may be.
    config = replace(config, stage1_weight=BUNDLED / "stage1_cc3m.ckpt", test_weight=BUNDLED / "stage2_vist.ckpt")
    model = open_model(config)
    settings = replace(config.generation, images="force")

    chat = Conversation()
    prompt = chat.ask("look at this . Tell me the next scene with image.", [open_picture(HERE / "story_0.png")])
    (first,) = model.generate([prompt], settings)
    chat.answer(first)
    print("first:", first.text, [picture.size for picture in first.images])

    (second,) = model.generate([chat.ask("What should happen then?", fits=model.fits)], settings)
    print("second:", second.text, [picture.size for picture in second.images])


if __name__ == "__main__":
    main()
