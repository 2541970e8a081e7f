from random import Random

import numpy as np
import pytest

from minigpt5.tinyworld.renderer import RADII, Jitter, render, shape_mask, thing_mask
from minigpt5.tinyworld.scenes import BACKGROUNDS, POSITIONS, SHAPES, SIZES, Scene, Thing, grid_cell

SCENE = Scene((Thing("star", "red", "big", "upper left"),), "grass")


def test_pictures_are_square_rgb_and_depend_on_the_random_source_alone():
    first, again, other = (render(SCENE, Random(seed)) for seed in (1, 1, 2))
    assert first.size == (64, 64)
    assert first.mode == "RGB"
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("position", POSITIONS)
def test_things_stay_in_their_third_of_the_picture_whatever_the_jitter(shape, position):
    row, column = grid_cell(position)
    for seed in range(5):
        mask = thing_mask(Thing(shape, "red", "big", position), Jitter.draw(Random(seed)))
        rows, columns = np.nonzero(mask > 0.5)
        assert abs(rows.mean() - (11 + 20.5 * row)) < 4
        assert abs(columns.mean() - (11 + 20.5 * column)) < 4
        assert rows.max() - rows.min() <= 22
        assert columns.max() - columns.min() <= 22


def test_edges_are_anti_aliased():
    mask = shape_mask("circle", (32, 32), 10, 64)
    assert ((mask > 0) & (mask < 1)).sum() > 30
    assert mask.sum() == pytest.approx(np.pi * 100, rel=0.03)


def test_shapes_of_one_size_differ_clearly_even_when_small():
    masks = [shape_mask(shape, (32, 32), RADII["small"], 64) for shape in SHAPES]
    for first in range(len(masks)):
        for second in range(first):
            union = np.maximum(masks[first], masks[second]).sum()
            assert np.abs(masks[first] - masks[second]).sum() > 0.15 * union


@pytest.mark.parametrize("shape", SHAPES)
def test_big_things_cover_about_twice_as_much_as_small_ones(shape):
    small, big = (thing_mask(Thing(shape, "red", size, "middle")).sum() for size in SIZES)
    assert 2.0 < big / small < 2.6


def test_backgrounds_differ_clearly():
    corners = {
        name: np.asarray(render(Scene((Thing("circle", "red", "small", "middle"),), name), Random(0)))[40:, 40:]
        for name in BACKGROUNDS
    }
    means = [corner.reshape(-1, 3).mean(axis=0) for corner in corners.values()]
    for first in range(len(means)):
        for second in range(first):
            assert np.linalg.norm(means[first] - means[second]) > 20
