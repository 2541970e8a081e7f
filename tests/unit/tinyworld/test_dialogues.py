import re

import pytest

from minigpt5.data.mmdialog import window_start
from minigpt5.tinyworld.captions import read_attributes
from minigpt5.tinyworld.dialogues import MAX_TURN_WORDS, ask, make_dialogue
from minigpt5.tinyworld.scenes import belongs, random_scene, seeded

DIALOGUES = [make_dialogue(0, "train", index) for index in range(400)]


def test_turns_are_short_alternate_in_pairs_and_stay_ascii():
    for turns in DIALOGUES:
        assert len(turns) in (4, 6, 8)
        for turn in turns:
            assert len(turn.text.split()) <= MAX_TURN_WORDS
            assert turn.text.isascii()
            assert turn.text == turn.text.lower()


def test_both_speakers_show_pictures_and_some_turns_have_none():
    shown = [{position % 2 for position, turn in enumerate(turns) if turn.scene} for turns in DIALOGUES]
    assert sum(0 in roles for roles in shown) > 100
    assert sum(1 in roles for roles in shown) > 100
    without = sum(turn.scene is None for turns in DIALOGUES for turn in turns)
    assert 0.3 < without / sum(map(len, DIALOGUES)) < 0.8


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_picture_belongs_to_the_split(split):
    for index in range(200):
        assert all(belongs(turn.scene, split) for turn in make_dialogue(1, split, index) if turn.scene)


def test_questions_and_changes_refer_to_a_picture_that_the_prompt_still_holds():
    needs = re.compile(r"\b(can you (move|make|put|add)|now (make|move|show|add)|what colour|where is)\b")
    checked = 0
    for turns in DIALOGUES:
        for position in range(1, len(turns), 2):
            if needs.search(turns[position - 1].text):
                history = turns[window_start(position) : position]
                assert any(turn.scene for turn in history), [turn.text for turn in turns]
                checked += 1
    assert checked > 200


def test_a_picture_is_shown_exactly_where_the_turn_before_asks_for_one():
    wish = re.compile(
        r"\b(can you (show|move|make|put|add)|now (make|move|show|add)|please draw|show me"
        r"|i would like to see|what if)\b"
    )
    by_role = [0, 0]
    for turns in DIALOGUES:
        for position in range(1, len(turns)):
            asked = wish.search(turns[position - 1].text) is not None
            assert asked == (turns[position].scene is not None), [turn.text for turn in turns]
            by_role[position % 2] += asked
    assert min(by_role) > 50


def test_changes_are_asked_of_pictures_of_one_thing_and_questions_of_both():
    change = re.compile(r"\b(can you (move|make|put|add)|now (make|move|show|add)|what if)\b")
    question = re.compile(r"^(.* )?(what|where|is|how) .*\?$")
    changed, asked = [], []
    for turns in DIALOGUES:
        shown = None
        for turn in turns:
            shown = turn.scene or shown
            if shown and change.search(turn.text):
                changed.append(len(shown.things))
            elif shown and question.search(turn.text):
                asked.append(len(shown.things))
    assert len(changed) > 200
    assert set(changed) == {1}
    assert min(asked.count(1), asked.count(2)) > 50


def test_a_requested_picture_shows_what_was_asked_for():
    checked = 0
    for turns in DIALOGUES:
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            wanted = read_attributes(question.text)
            if answer.scene and len(wanted) == 5:
                main = answer.scene.main
                found = {name: getattr(main, name) for name in ("shape", "colour", "size", "position")}
                assert wanted == found | {"background": answer.scene.background}
                checked += 1
    assert checked > 50


@pytest.mark.parametrize("things", [1, 2])
def test_answers_are_true(things):
    for index in range(600):
        rng = seeded(0, "train", index)
        scene = random_scene(rng, "train", things)
        question, answer = ask(scene, rng)
        told = read_attributes(answer)
        if question == "how many things do you see ?":
            assert answer == ("one ." if things == 1 else "two .")
            continue
        truth = {name: getattr(scene.main, name) for name in ("shape", "colour", "size", "position")}
        truth |= {"background": scene.background}
        assert told.items() <= truth.items(), (question, answer)
        assert told or question.startswith("what is behind")
        if answer.startswith(("yes", "no")):
            asked = read_attributes(question.replace("the ", ""))
            asked = {name: value for name, value in asked.items() if name in told}
            assert (asked == told) == answer.startswith("yes"), (question, answer)


def test_dialogues_repeat_for_the_same_seed_and_number():
    assert make_dialogue(4, "train", 7) == make_dialogue(4, "train", 7)
    assert make_dialogue(4, "train", 7) != make_dialogue(4, "train", 8)
