"""A chat becomes the prompt the model was trained on."""

import pytest
from PIL import Image

from minigpt5 import prompts
from minigpt5.conversation import Conversation, mark_pictures
from minigpt5.data.types import Reply

PICTURE = Image.new("RGB", (6, 4), "red")


def test_a_question_is_written_as_in_training():
    prompt = Conversation("S.").ask("hello")
    assert prompt.text == "S.###Human: hello ###Assistant:"


def test_pictures_without_a_mark_come_first_and_are_squared():
    prompt = Conversation("S.").ask("what is it", [PICTURE])
    assert prompt.text == "S.###Human: <Img><ImageHere></Img>what is it ###Assistant:"
    assert prompt.images[0].size == (6, 6)


def test_generated_pictures_are_seen_later():
    chat = Conversation("S.")
    chat.ask("<ImageHere> then", [PICTURE])
    chat.answer(Reply("x", ("a boat", PICTURE), "", ()))
    prompt = chat.ask("and then")
    assert prompt.text == (
        "S.###Human: <Img><ImageHere></Img> then ###Assistant: a boat <Img><ImageHere></Img>\n"
        "###Human: and then ###Assistant:"
    )
    assert len(prompt.images) == prompt.text.count("<ImageHere>") == 2


def test_the_oldest_turns_are_left_out_until_a_prompt_fits():
    chat = Conversation("S.")
    for number in range(3):
        chat.ask(f"question {number}", [PICTURE])
        chat.answer(Reply("x", (f"answer {number}",), "", ()))
    whole = chat.ask("now", fits=lambda prompt: len(prompt.text) < 1000)
    assert whole == chat.prompt()
    chat.take_back()
    shorter = chat.ask("now", fits=lambda prompt: len(prompt.text) < len(whole.text))
    assert "question 0" not in shorter.text and "answer 0" not in shorter.text
    assert shorter.text.startswith("S.###Human: <Img><ImageHere></Img>question 1 ")
    assert shorter.text.endswith("###Human: now ###Assistant:")
    assert len(shorter.images) == shorter.text.count("<ImageHere>") == 2
    assert len(chat.turns) == 7


def test_a_question_that_fits_nowhere_is_refused_and_forgotten():
    chat = Conversation("S.")
    chat.ask("hello")
    chat.answer(Reply("x", ("hi",), "", ()))
    with pytest.raises(ValueError, match="longer than the model can read"):
        chat.ask("far too long", fits=lambda prompt: "far" not in prompt.text)
    assert [turn.text for turn in chat.turns] == ["hello ", "hi\n"]
    chat.take_back()
    assert len(chat.turns) == 2


@pytest.mark.parametrize("mark", ["<ImageHere>", "<Img><ImageHere>", "<Img><ImageHere></Img>"])
def test_every_way_to_mark_a_picture_ends_whole(mark):
    assert mark_pictures(f"a {mark} b") == f"a {prompts.PICTURE} b"


def test_more_marks_than_pictures_are_refused():
    with pytest.raises(ValueError, match="2 <ImageHere> but 1 pictures"):
        Conversation().ask("<ImageHere><ImageHere>", [PICTURE])
