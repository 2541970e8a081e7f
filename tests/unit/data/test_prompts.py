"""Template choice and the pieces prompts are made of. The strings themselves are held by the parity tests."""

from collections import Counter

from minigpt5 import prompts


def test_the_choice_depends_on_seed_and_sample_id_and_uses_every_template():
    choose, same, other = prompts.HashedChoice(1), prompts.HashedChoice(1), prompts.HashedChoice(2)
    ids = [f"cc3m_{i}_instruction" for i in range(700)]
    picks = [choose(i, prompts.CC3M_GENERATION) for i in ids]
    assert picks == [same(i, prompts.CC3M_GENERATION) for i in reversed(ids)][::-1]
    assert picks != [other(i, prompts.CC3M_GENERATION) for i in ids]
    counts = Counter(picks)
    assert set(counts) == set(prompts.CC3M_GENERATION) and min(counts.values()) > 60


def test_story_history_puts_a_picture_behind_each_caption():
    picture = "<Img><ImageHere></Img>"
    assert prompts.story_history([]) == ""
    assert prompts.story_history(["one", "two"]) == f"one{picture}two{picture}\n"


def test_dialogue_history_alternates_speakers_and_ends_with_the_next_one():
    text = prompts.dialogue_history([("hi", True), ("hello", False)])
    assert text.endswith(" ###Human: hi <Img><ImageHere></Img> ###Assistant: hello ###Human:")
    swapped = prompts.dialogue_history([("hello", False)], first_speaker=prompts.ASSISTANT)
    assert swapped.endswith(" ###Assistant: hello ###Human:")
