"""The web page's answer to a message, without a browser."""

import importlib.util
import socket

import pytest

from minigpt4.errors import InputError
from minigpt5.config import PROJECT_ROOT, load_config
from tests.integration.conftest import TINY

pytest.importorskip("gradio", reason="the web demo's tests need gradio")


@pytest.fixture(scope="module")
def web_demo():
    spec = importlib.util.spec_from_file_location("web_demo", PROJECT_ROOT / "examples" / "web_demo.py")
    web_demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(web_demo)
    return web_demo


@pytest.fixture(scope="module")
def page(web_demo):
    quick = {"generation.max_new_tokens": 6, "generation.num_inference_steps": 2}
    weights = {"stage": "multimodal", "stage1_weight": "stage1_cc3m.ckpt", "test_weight": "stage2_vist.ckpt"}
    return web_demo.build_page(load_config(TINY, {**quick, **weights}, {}))


@pytest.mark.slow
def test_a_message_with_a_picture_is_answered_with_one_and_remembered(page):
    reply = page.fns[0].fn
    message = {"text": "look at this .", "files": [str(PROJECT_ROOT / "examples" / "story_0.png")]}
    shown, chat, box = reply(message, [], None, "always", 7.5, 2)
    assert [entry["role"] for entry in shown[:2]] == ["user", "user"]
    assert shown[1]["content"] == "look at this ."
    assert any(entry["role"] == "assistant" and not isinstance(entry["content"], str) for entry in shown)
    assert box == {"text": "", "files": []}
    again, chat, _ = reply({"text": "and then", "files": []}, shown, chat, "never", 7.5, 2)
    assert len(again) > len(shown)
    assert len(chat.turns) == 4
    assert len(chat.prompt().images) >= 2


def test_marks_without_pictures_are_an_error_on_the_page(page):
    import gradio

    with pytest.raises(gradio.Error, match="1 <ImageHere> but 0 pictures"):
        page.fns[0].fn({"text": "<ImageHere>", "files": []}, [], None, "never", 7.5, 2)


def test_a_file_that_is_no_picture_is_named_on_the_page(page, tmp_path):
    import gradio

    (tmp_path / "notes.png").write_text("no picture")
    message = {"text": "look", "files": [str(tmp_path / "notes.png")]}
    with pytest.raises(gradio.Error, match=r"notes\.png: not a readable picture"):
        page.fns[0].fn(message, [], None, "never", 7.5, 2)


@pytest.mark.slow
def test_what_is_shown_goes_to_the_browser_and_back(page):
    import gradio

    message = {"text": "look at this .", "files": [str(PROJECT_ROOT / "examples" / "story_0.png")]}
    shown, _, _ = page.fns[0].fn(message, [], None, "always", 7.5, 2)
    (chatbot,) = (block for block in page.blocks.values() if isinstance(block, gradio.Chatbot))
    back = chatbot.preprocess(chatbot.postprocess(shown))
    assert [entry["role"] for entry in back] == [entry["role"] for entry in shown]


def test_a_taken_port_is_named_before_anything_is_loaded(web_demo):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: cannot be served on"):
            web_demo.check_port("127.0.0.1", port)
    web_demo.check_port("127.0.0.1", port)
    with pytest.raises(InputError, match="--port 70000"):
        web_demo.check_port("127.0.0.1", 70_000)
