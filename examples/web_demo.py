r"""A chat page for MiniGPT-5: write, attach pictures, get text and pictures back.

    python examples/web_demo.py --config config/tiny.yaml --test_weight stage2_vist.ckpt \
        --stage1_weight stage1_cc3m.ckpt --stage multimodal

Needs gradio 6: ``pip install gradio``. The page is served on this machine only, unless ``--share`` or ``--host``
says otherwise. Every flag of ``train_eval.py`` that chooses a model or how it decodes works here too.
"""

import argparse
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minigpt4.errors import InputError  # noqa: E402
from minigpt5.arguments import parse_arguments, resolve_config  # noqa: E402
from minigpt5.cli import run_command  # noqa: E402
from minigpt5.config import GenerationConfig, RunConfig  # noqa: E402

POLICIES: dict[str, Any] = {"when the model wants": "auto", "always": "force", "never": "never"}


def main(argv: Sequence[str]) -> None:
    """Load the model and serve the page until interrupted.

    Raises:
        InputError: a flag or file that cannot be used, or gradio is not installed.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="port to serve on (default: 7860)")
    parser.add_argument("--share", action="store_true", help="also open a public gradio address")
    own, shared = parser.parse_known_args(argv)
    config = resolve_config(parse_arguments(shared), os.environ)
    if config.test_weight is None:
        raise InputError("--test_weight: give the checkpoint to talk to")
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the web demo needs gradio: pip install gradio")
    check_port(own.host, own.port)
    page = build_page(config)
    page.launch(server_name=own.host, server_port=own.port, share=own.share)


def check_port(host: str, port: int) -> None:
    """Check that the page can be served there, before a model is loaded for it.

    Raises:
        InputError: the port is taken, or not this machine's to give.
    """
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: cannot be served on ({error}); give another") from None


def build_page(config: RunConfig) -> Any:
    """Return the gradio page over a loaded model."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    from minigpt5.conversation import Conversation
    from minigpt5.images import open_picture
    from minigpt5.runs import open_model

    model = open_model(config)

    def reply(
        message: dict[str, Any],
        shown: list[dict[str, Any]],
        chat: Conversation | None,
        policy: str,
        scale: float,
        steps: int,
    ) -> tuple[list[dict[str, Any]], Conversation, dict[str, Any]]:
        chat = chat or Conversation()
        try:
            pictures = [open_picture(Path(path)) for path in message["files"]]
            prompt = chat.ask(message["text"], pictures, model.fits)
        except ValueError as error:
            raise gradio.Error(str(error)) from None
        try:
            answer = model.generate([prompt], _settings(config, policy, scale, int(steps)))[0]
        except Exception as error:
            chat.take_back()  # or every later question would be asked after it
            if isinstance(error, InputError):
                raise gradio.Error(str(error)) from None
            raise
        chat.answer(answer)
        shown = [*shown, *[_shown("user", gradio.Image(picture)) for picture in pictures]]
        if message["text"]:
            shown.append(_shown("user", message["text"]))
        shown += [
            _shown("assistant", part if isinstance(part, str) else gradio.Image(part, format="png"))
            for part in answer.parts or ("(nothing)",)
        ]
        return shown, chat, {"text": "", "files": []}

    with gradio.Blocks(title="MiniGPT-5") as page:
        gradio.Markdown("# MiniGPT-5\nWrite, attach pictures, and get text and pictures back.")
        chat = gradio.State(None)
        shown = gradio.Chatbot(height=480, label="Conversation")
        box = gradio.MultimodalTextbox(
            placeholder="Tell me the next scene with image.",
            file_types=["image"],
            file_count="multiple",
            label="You",
        )
        with gradio.Row():
            policy = gradio.Radio(list(POLICIES), value="when the model wants", label="Pictures")
            scale = gradio.Slider(1, 15, value=config.generation.guidance_scale, step=0.5, label="Guidance scale")
            steps = gradio.Slider(1, 100, value=config.generation.num_inference_steps, step=1, label="Steps")
        clear = gradio.Button("New conversation")
        box.submit(reply, [box, shown, chat, policy, scale, steps], [shown, chat, box])
        clear.click(lambda: ([], None), None, [shown, chat])
    return page


def _settings(config: RunConfig, policy: str, scale: float, steps: int) -> GenerationConfig:
    # Each request runs in a thread of its own; CUDA graphs belong to the thread that made them.
    return replace(
        config.generation,
        compile=False,
        images=POLICIES[policy],
        guidance_scale=scale,
        num_inference_steps=steps,
    )


def _shown(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


if __name__ == "__main__":
    sys.exit(run_command(main))
