from random import Random

from minigpt5.tinyworld.captions import (
    SEEN_WORDS,
    article,
    caption,
    padded_words,
    plain_words,
    read_attributes,
    seen_words,
)
from minigpt5.tinyworld.scenes import Scene, Thing, random_scene, seeded


def test_captions_name_every_attribute_of_the_main_thing_and_the_background():
    for index in range(1500):
        rng = seeded(0, "train", index)
        scene = random_scene(rng, "train", things=1 + index % 2)
        main = scene.main
        wanted = {
            "size": main.size,
            "shape": main.shape,
            "colour": main.colour,
            "position": main.position,
            "background": scene.background,
        }
        text = caption(scene, rng)
        assert read_attributes(text) == wanted, text


def test_captions_vary_in_wording_but_stay_lower_case_ascii():
    scene = Scene((Thing("circle", "orange", "big", "middle"),), "snow")
    texts = {caption(scene, Random(seed)) for seed in range(300)}
    assert len(texts) > 40
    assert all(text.isascii() and text == text.lower() for text in texts)


def test_captions_of_two_things_name_the_second_too():
    scene = Scene((Thing("circle", "red", "big", "middle"), Thing("ring", "blue", "small", "upper left")), "snow")
    for seed in range(20):
        text = caption(scene, Random(seed))
        rest = text[text.index("blue") - 20 :]
        assert "ring" in rest
        assert "left" in rest


def test_reading_partial_text_gives_what_is_there():
    assert read_attributes("it turns blue .") == {"colour": "blue"}
    assert read_attributes("is it tiny ?") == {"size": "small"}
    assert read_attributes("it is at the top .") == {"position": "top"}
    assert read_attributes("the red box , then a blue star") == {"colour": "red", "shape": "square"}
    assert read_attributes("hello") == {}


def test_article():
    assert article("orange star") == "an orange star"
    assert article("red star") == "a red star"


def test_plain_words_name_everything_in_one_order_and_differ_where_scenes_do():
    both = Scene((Thing("circle", "red", "big", "middle"), Thing("ring", "blue", "small", "upper left")), "snow")
    assert plain_words(both) == "snow big red circle middle center small blue ring upper left"
    scenes = {random_scene(seeded(0, "train", index), "train", things=1 + index % 2) for index in range(500)}
    assert len({plain_words(scene) for scene in scenes}) == len(scenes)


def test_padded_words_are_plain_words_with_dots_in_the_place_of_a_second_thing():
    circle, ring = Thing("circle", "red", "big", "middle"), Thing("ring", "blue", "small", "upper left")
    both, one = Scene((circle, ring), "snow"), Scene((circle,), "snow")
    assert padded_words(both) == plain_words(both)
    assert padded_words(one) == f"{plain_words(one)} . . . . ."
    assert len(padded_words(one).split()) == len(padded_words(both).split()) == SEEN_WORDS


def test_what_a_picture_tells_does_not_show_which_thing_is_the_main_one():
    circle, ring = Thing("circle", "red", "big", "middle"), Thing("ring", "blue", "small", "upper left")
    expected = "snow small blue ring upper left big red circle middle center"
    assert seen_words(Scene((circle, ring), "snow")) == seen_words(Scene((ring, circle), "snow")) == expected
    assert seen_words(Scene((ring,), "snow")) == "snow small blue ring upper left . . . . ."
    assert len(expected.split()) == SEEN_WORDS
