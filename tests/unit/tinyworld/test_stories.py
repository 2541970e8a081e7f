from collections import Counter
from dataclasses import fields, replace

import pytest

from minigpt5.tinyworld.captions import read_attributes
from minigpt5.tinyworld.events import EVENT_KINDS, fits, random_event, tells_news
from minigpt5.tinyworld.scenes import Scene, Thing, belongs, random_scene, seeded
from minigpt5.tinyworld.stories import STORY_LENGTH, make_story

CHANGED = {"move": "position", "resize": "size", "recolour": "colour"}


def differences(before, after):
    changed = [
        field.name
        for field in fields(Thing)
        if getattr(before.main, field.name) != getattr(after.main, field.name)
    ]
    changed += ["background"] if before.background != after.background else []
    changed += ["others"] if before.things[1:] != after.things[1:] else []
    return changed


@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_step_changes_exactly_what_its_event_says(split):
    expected = CHANGED | {"background": "background", "meet": "others", "leave": "others"}
    for index in range(200):
        steps = make_story(0, split, index).steps
        assert len(steps) == STORY_LENGTH
        assert steps[0].event is None
        for before, step in zip(steps, steps[1:], strict=False):
            assert differences(before.scene, step.scene) == [expected[step.event]]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_scene_belongs_to_the_split(split):
    assert all(belongs(step.scene, split) for index in range(200) for step in make_story(1, split, index).steps)


def test_sentences_tell_the_new_value():
    for index in range(300):
        for step in make_story(2, "train", index).steps[1:]:
            attribute = CHANGED.get(step.event)
            if attribute and not step.text.endswith(("grows .", "shrinks .")):
                goal = step.text.replace("to the", "in the") if attribute == "position" else step.text
                value = getattr(step.scene.main, attribute)
                words = read_attributes(goal).get(attribute, step.text)
                assert words == value or f"the {value}" in words, step.text


def test_all_kinds_of_events_and_of_openings_occur_about_evenly():
    stories = [make_story(0, "train", index) for index in range(300)]
    kinds = Counter(step.event for story in stories for step in story.steps[1:])
    assert set(kinds) == set(EVENT_KINDS)
    assert min(kinds.values()) > 50
    told = Counter(story.told for story in stories)
    assert min(told["all"], told["some"], told["nothing"]) > 40


def test_a_silent_opening_tells_no_attribute():
    silent = [story for index in range(200) if (story := make_story(0, "train", index)).told == "nothing"]
    assert len(silent) > 20
    assert all(read_attributes(story.steps[0].text) == {} for story in silent)


def test_stories_repeat_for_the_same_seed_and_number():
    assert make_story(4, "train", 7) == make_story(4, "train", 7)
    assert make_story(4, "train", 7) != make_story(5, "train", 7)


def test_excluded_kinds_do_not_happen():
    for index in range(100):
        rng = seeded(0, "train", index)
        scene = random_scene(rng, "train")
        event = random_event(scene, "train", rng, exclude=("move", "background"))
        assert event is not None
        assert event.kind not in ("move", "background")


def test_every_told_event_fits_the_picture_after_it_and_not_the_one_before():
    kinds = Counter()
    for index in range(300):
        steps = make_story(0, "validation", index).steps
        for before, step in zip(steps, steps[1:], strict=False):
            assert fits(step.text, step.scene, before.scene), (step.text, step.scene)
            assert tells_news(step.text, step.scene, before.scene), (step.text, step.scene)
            kinds[step.event] += 1
            # "it" may be either of two things.
            if len(before.scene.things) == 1:
                assert not fits(step.text, before.scene, before.scene), (step.text, before.scene)
    assert set(kinds) == set(EVENT_KINDS)


def test_what_was_so_before_is_no_news():
    star, blue = Thing("star", "red", "big", "top"), Thing("ring", "blue", "small", "bottom")
    before, moved = Scene((star, blue), "snow"), Scene((replace(star, position="left"), blue), "snow")
    for text in ("now it is on the snow .", "it is big .", "it turns red .", "it turns blue ."):
        assert fits(text, moved, before)
        assert not tells_news(text, moved, before)
    assert tells_news("it moves to the left .", moved, before)
    # The star turns blue: that the ring was blue before takes nothing from it.
    assert tells_news("it turns blue .", Scene((replace(star, colour="blue"), blue), "snow"), before)
    assert not tells_news("it turns green .", moved, before)


@pytest.mark.parametrize("text", ["", "look at this .", "it it it", "it turns .", "the goes away ."])
def test_a_sentence_that_names_nothing_fits_no_picture(text):
    assert not fits(text, random_scene(seeded(0, "train", 0), "train"))


def test_each_of_two_things_that_a_sentence_names_must_be_there():
    star, ring = Thing("star", "red", "big", "top"), Thing("ring", "blue", "small", "bottom")
    both, alone = Scene((star, ring), "snow"), Scene((star,), "snow")
    text = "a big red star at the top and a small blue ring at the bottom on the snow ."
    assert fits(text, both)
    assert tells_news(text, both, alone)
    assert not fits(text, alone)
    assert not fits("a big red star at the top and a small pink ring at the bottom on the snow .", both)
    assert not fits("a big red star at the top on the snow and a small blue ring at night .", both)


def test_only_what_was_there_can_leave():
    star, ring = Thing("star", "red", "big", "top"), Thing("ring", "blue", "small", "bottom")
    both, alone = Scene((star, ring), "snow"), Scene((star,), "snow")
    assert fits("the blue ring goes away .", alone, both)
    assert not fits("the pink heart goes away .", alone, both)
    assert not fits("the blue ring leaves .", both, both)
    assert not fits("the blue ring leaves .", alone)
