from itertools import product

import pytest

from minigpt5.tinyworld.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    apart,
    belongs,
    is_held_out,
    random_scene,
    seeded,
)

COMBINATIONS = [
    (Thing(*values), background) for *values, background in product(SHAPES, COLOURS, SIZES, POSITIONS, BACKGROUNDS)
]


def test_about_a_fifth_of_all_combinations_is_held_out():
    held_out = [pair for pair in COMBINATIONS if is_held_out(*pair)]
    assert len(COMBINATIONS) == 8 * 8 * 2 * 9 * 5
    assert 0.18 < len(held_out) / len(COMBINATIONS) < 0.22


@pytest.mark.parametrize("values", [SHAPES, COLOURS, SIZES, POSITIONS, BACKGROUNDS])
def test_every_attribute_value_is_on_both_sides_of_the_split(values):
    for value in values:
        sides = {
            is_held_out(thing, background)
            for thing, background in COMBINATIONS
            if value in (thing.shape, thing.colour, thing.size, thing.position, background)
        }
        assert sides == {True, False}


def test_a_scene_belongs_to_one_split_or_mixes_and_belongs_to_none():
    train = [pair for pair in COMBINATIONS if not is_held_out(*pair)]
    held_out = [pair for pair in COMBINATIONS if is_held_out(*pair)]
    known, background = train[0]
    new = next(thing for thing, other in held_out if other == background)
    assert belongs(Scene((known,), background), "train")
    assert belongs(Scene((new,), background), "test")
    assert belongs(Scene((new,), background), "validation")
    assert not belongs(Scene((known, new), background), "train")
    assert not belongs(Scene((known, new), background), "test")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("things", [1, 2])
def test_random_scenes_belong_to_their_split_and_keep_things_apart(split, things):
    for index in range(200):
        scene = random_scene(seeded(0, split, index), split, things)
        assert len(scene.things) == things
        assert belongs(scene, split)
        if things == 2:
            first, second = scene.things
            assert first.shape != second.shape
            assert first.colour != second.colour
            assert apart(first.position, second.position)


def test_seeded_draws_repeat_and_differ_between_records():
    def draw(index):
        return random_scene(seeded(3, "train", index), "train")

    assert draw(5) == draw(5)
    assert len({draw(index) for index in range(50)}) > 40


def test_neighbouring_cells_are_not_apart_but_diagonal_ones_are():
    assert not apart("middle", "left")
    assert not apart("top", "top")
    assert apart("middle", "upper left")
    assert apart("left", "right")


@pytest.mark.parametrize(("split", "things"), [("val", 1), ("train", 0), ("train", 3)])
def test_unknown_split_or_number_of_things_is_refused(split, things):
    with pytest.raises(ValueError, match="splits are train, validation, test"):
        random_scene(seeded(0, "train"), split, things)
