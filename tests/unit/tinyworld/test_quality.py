import json
import re

import pytest

from minigpt4.errors import InputError
from minigpt5.predictions import Prediction, PredictionStore
from minigpt5.tinyworld.__main__ import main
from minigpt5.tinyworld.overview import SHOWN, write_overview
from minigpt5.tinyworld.quality import score_folder
from minigpt5.tinyworld.renderer import render
from minigpt5.tinyworld.scenes import Scene, Thing, seeded

STAR = Thing("star", "red", "big", "top")
RING = Thing("ring", "blue", "small", "lower left")
WANTED = Scene((STAR,), "snow")


def picture(scene):
    return render(scene, seeded(0, "validation", "test"))


STORY_PROMPT = Scene((RING,), "sand")


def store(folder, dataset, *replies):
    """Write replies (task, text, wanted scene, made scene, shown scene) as a store; a story's are its steps."""
    predictions = PredictionStore(folder, {})
    for number, (task, text, *scenes) in enumerate(replies):
        wanted, made, shown = ([picture(scene)] if scene else [] for scene in scenes)
        name = f"7_{number}-{'gen' if task == 'generation' else task}"
        prediction = Prediction(name, dataset, task, "", text, "")
        predictions.append(prediction, images=made, target_images=wanted, input_images=shown)
    return {share.name: (share.right, share.total) for share in score_folder(folder) if share.total}


def test_each_attribute_counts_for_itself_and_a_missing_picture_is_wrong_in_all(tmp_path):
    made = [
        WANTED,
        Scene((Thing("star", "red", "small", "top"),), "snow"),
        Scene((Thing("star", "blue", "big", "top"),), "night"),
        None,
    ]
    found = store(tmp_path, "cc3m", *(("caption", "[IMG0]", WANTED, one, None) for one in made))
    assert found == {
        "shape_and_colour": (2, 4),
        "all_attributes": (1, 4),
        "size": (2, 4),
        "position": (3, 4),
        "background": (2, 4),
        "whole_picture": (1, 4),
        "modality": (3, 4),
    }


def test_both_things_must_be_there_in_either_order(tmp_path):
    both = Scene((STAR, RING), "snow")
    made = [Scene((RING, STAR), "snow"), Scene((STAR,), "snow"), None]
    found = store(tmp_path, "cc3m", *(("caption", "", both, one, None) for one in made))
    assert found["both_things"] == (1, 3)
    assert found["all_attributes"] == (2 + 1, 6)


def test_a_thing_too_many_or_another_background_is_not_the_whole_picture(tmp_path):
    both, elsewhere = Scene((STAR, RING), "snow"), Scene((STAR,), "night")
    found = store(tmp_path, "cc3m", *(("caption", "", WANTED, one, None) for one in (WANTED, both, elsewhere)))
    assert found["whole_picture"] == (1, 3)
    assert found["shape_and_colour"] == (3, 3)


def test_of_two_wanted_things_a_third_is_one_too_many(tmp_path):
    both, third = Scene((STAR, RING), "snow"), Thing("heart", "pink", "small", "middle")
    three = Scene((STAR, RING, third), "snow")
    found = store(tmp_path, "cc3m", *(("caption", "", both, one, None) for one in (both, three)))
    assert found["whole_picture"] == found["both_things"] == (1, 2)
    assert found["all_attributes"] == (4, 4)


def test_to_show_the_picture_before_again_is_no_whole_picture(tmp_path):
    """Of the wanted things most are often there already, but a story's next picture is another one."""
    both = Scene((STAR, RING), "snow")
    found = store(
        tmp_path,
        "vist",
        ("generation", "", both, both, None),
        ("generation", "", WANTED, both, None),  # one leaves
        ("generation", "", both, WANTED, None),  # it comes again
    )
    assert found["all_attributes"] == (1 + 1, 1 + 2)
    assert found["whole_picture"] == (0, 2)


def test_the_thing_that_a_change_was_asked_of_counts_though_it_be_the_smaller(tmp_path):
    both = Scene((STAR, RING), "snow")
    unchanged = Scene((STAR, Thing("ring", "green", "small", "lower left")), "snow")
    found = store(tmp_path, "mmdialog", ("dialogue", "", both, unchanged, None))
    assert found["all_attributes"] == (1, 2)
    assert found["size"] == (2, 2)


def test_a_thing_can_leave_only_the_picture_that_it_was_in(tmp_path):
    both = Scene((STAR, RING), "snow")
    replies = [
        Prediction(f"7_{number}-understanding", "vist", "understanding", "", text, "")
        for number, text in enumerate(("the blue ring leaves .", "the pink heart leaves ."))
    ]
    predictions = PredictionStore(tmp_path, {})
    for reply in replies:
        predictions.append(reply, images=[], target_images=[], input_images=[picture(both), picture(WANTED)])
    shares = {share.name: (share.right, share.total) for share in score_folder(tmp_path) if share.total}
    assert shares["text_consistent"] == shares["text_news"] == (1, 2)


def test_what_was_there_before_is_the_storys_also_where_the_prompt_keeps_it_back(tmp_path):
    both = Scene((STAR, RING), "snow")
    found = store(
        tmp_path,
        "vist",
        ("generation", "", both, None, None),
        ("understanding", "the blue ring leaves .", None, None, WANTED),
        ("understanding", "the blue ring leaves .", None, None, WANTED),  # nothing tells what was before
    )
    assert found["text_consistent"] == (1, 2)
    assert found["text_news"] == (1, 1)


def test_a_true_sentence_that_tells_nothing_new_agrees_all_the_same(tmp_path):
    found = store(
        tmp_path,
        "vist",
        ("generation", "", Scene((STAR,), "snow"), None, None),
        ("understanding", "now it is on the snow .", None, None, Scene((RING,), "snow")),
    )
    assert found["text_consistent"] == (1, 1)
    assert found["text_news"] == (0, 1)


def test_a_story_sentence_is_held_against_the_shown_or_the_made_picture(tmp_path):
    found = store(
        tmp_path,
        "vist",
        ("understanding", "it turns red .", None, None, WANTED),
        ("understanding", "it turns blue .", None, None, WANTED),
        ("multimodal", "it turns blue . [IMG0]", WANTED, Scene((RING,), "snow"), None),
        ("multimodal", "it turns blue .", WANTED, None, None),
        ("generation", "[IMG0]", WANTED, WANTED, None),
    )
    assert found["text_consistent"] == (2, 3)
    assert found["modality"] == (4, 5)


def test_a_storys_pictures_count_where_what_came_before_tells_what_they_show(tmp_path):
    other = Scene((RING,), "snow")
    found = store(
        tmp_path,
        "vist",
        ("generation", "[IMG0]", WANTED, other, None),  # the story's first
        ("generation", "[IMG0]", WANTED, WANTED, STORY_PROMPT),
        ("generation", "[IMG0]", WANTED, other, STORY_PROMPT),
        ("generation", "[IMG0]", WANTED, other, None),  # the prompt keeps earlier pictures back: that is measured
        ("multimodal", "it turns blue . [IMG0]", WANTED, other, STORY_PROMPT),
    )
    assert found["all_attributes"] == (1, 3)
    assert found["modality"] == (5, 5)


def test_a_picture_that_nobody_wanted_is_the_wrong_modality(tmp_path):
    found = store(tmp_path, "mmdialog", ("dialogue", "", None, WANTED, None), ("dialogue", "", None, None, None))
    assert found == {"modality": (1, 2)}


def test_the_command_prints_each_share_and_can_fail_below_a_floor(tmp_path, capsys):
    store(tmp_path / "good", "cc3m", ("caption", "", WANTED, WANTED, None))
    store(tmp_path / "bad", "cc3m", ("caption", "", WANTED, Scene((RING,), "snow"), None))
    assert main(["score", str(tmp_path / "good")]) == 0
    assert main(["score", "--check", str(tmp_path / "good")]) == 0
    capsys.readouterr()
    assert main(["score", "--check", str(tmp_path / "good"), str(tmp_path / "bad")]) == 1
    printed = capsys.readouterr()
    assert "wanted thing: shape and colour" in printed.out
    assert printed.err == f"floors not met or not measured: {tmp_path / 'bad'}: shape_and_colour\n"


def test_a_floor_that_nothing_was_measured_on_is_not_met(tmp_path, capsys):
    store(tmp_path, "mmdialog", ("dialogue", "", None, None, None))
    page = tmp_path / "page.html"
    assert main(["score", "--check", str(tmp_path), "--page", str(page)]) == 1
    printed = capsys.readouterr()
    assert re.search(r"wanted thing: all five attributes +nothing to measure it on +floor  80%", printed.out)
    assert "not measured" in printed.err and "all_attributes" in printed.err
    assert "nothing to measure" in page.read_text()


def test_a_folder_without_predictions_is_refused(tmp_path):
    with pytest.raises(InputError, match="no predictions"):
        score_folder(tmp_path)


def test_the_page_shows_every_data_sets_shares_and_replies_with_pictures_that_are_there(tmp_path):
    store(tmp_path / "out" / "a", "cc3m", ("caption", "<s> [IMG0] [IMG1]", WANTED, WANTED, None))
    story = ("understanding", "it turns <b>blue</b> .", None, None, WANTED)
    store(tmp_path / "out" / "b", "vist", *[story] * 20, ("multimodal", "it turns red .", WANTED, WANTED, None))
    page = tmp_path / "out" / "page.html"
    folders = [str(tmp_path / "out" / name) for name in "ab"]
    assert main(["score", *folders, "--page", str(page)]) == 0
    html = page.read_text()
    links = re.findall('src="([^"]+)"', html)
    assert len(links) == 2 + 2
    assert all((page.parent / link).is_file() for link in links)
    assert html.count("<article>") == 1 + SHOWN
    assert "it turns red ." in html
    assert "&lt;s&gt;" not in html
    assert "it turns &lt;b&gt;blue&lt;/b&gt; ." in html
    assert "85% not reached" in html


def test_the_pages_place_is_checked_before_anything_is_scored(tmp_path, capsys):
    folder = str(tmp_path / "one")
    store(tmp_path / "one", "cc3m", ("caption", "", WANTED, WANTED, None))
    assert main(["score", folder, "--page", str(tmp_path / "new" / "deep" / "page.html")]) == 0
    assert (tmp_path / "new" / "deep" / "page.html").is_file()
    (tmp_path / "file").touch()
    capsys.readouterr()
    with pytest.raises(InputError, match="--page .*file: cannot be made a folder"):
        main(["score", folder, "--page", str(tmp_path / "file" / "page.html")])
    with pytest.raises(InputError, match="--page .*new: is a folder"):
        main(["score", folder, "--page", str(tmp_path / "new")])
    assert not capsys.readouterr().out


def test_a_prompts_pictures_stand_in_their_places(tmp_path):
    store(tmp_path / "a", "vist", ("understanding", "", None, None, WANTED))
    path = tmp_path / "a" / "predictions.jsonl"
    line = json.loads(path.read_text()) | {"prompt": "system###Human:it <i> moves .<Img><ImageHere></Img> why"}
    path.write_text(json.dumps(line) + "\n")
    write_overview(tmp_path / "page.html", {tmp_path / "a": score_folder(tmp_path / "a")})
    prompt = re.search('class="prompt">(.*?)</p>', (tmp_path / "page.html").read_text())[1]
    assert re.fullmatch(
        r"system<br><b>Human:</b>it &lt;i&gt; moves \.<img [^>]*a/images/in-[0-9a-f]+\.png[^>]*> why",
        prompt,
    )
