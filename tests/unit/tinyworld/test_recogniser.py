import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from minigpt5.tinyworld.recogniser import compare, recognise
from minigpt5.tinyworld.renderer import render
from minigpt5.tinyworld.scenes import Scene, Thing, random_scene, seeded


def pictures(count, things=1, seed=0):
    for index in range(count):
        rng = seeded(seed, "test", things, index)
        scene = random_scene(rng, "test", things)
        yield index, scene, render(scene, rng)


def as_jpeg(picture):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, subsampling=0)
    return Image.open(file)


def spoil(picture, seed, blur=1.0, noise=8.0):
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)), dtype=float)
    pixels += np.random.default_rng(seed).normal(0, noise, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def same(found, wanted):
    return (set(found.things), found.background) == (set(wanted.things), wanted.background)


def test_one_thing_is_read_back_exactly_from_2000_held_out_pictures():
    wrong = [(scene, recognise(picture)) for _, scene, picture in pictures(2000)]
    assert [pair for pair in wrong if not same(pair[1], pair[0])] == []


def test_both_things_are_read_back_exactly():
    wrong = [(scene, recognise(picture)) for _, scene, picture in pictures(600, things=2)]
    assert [pair for pair in wrong if not same(pair[1], pair[0])] == []


@pytest.mark.parametrize("things", [1, 2])
def test_jpeg_files_are_read_back_exactly(things):
    for _, scene, picture in pictures(300, things, seed=1):
        assert same(recognise(as_jpeg(picture)), scene)


@pytest.mark.parametrize("things", [1, 2])
def test_slight_blur_and_noise_leave_98_percent_right(things):
    right = [same(recognise(spoil(picture, index)), scene) for index, scene, picture in pictures(500, things, 2)]
    assert np.mean(right) >= 0.98


def test_strong_blur_and_noise_leave_most_attributes_right():
    checks = [
        compare(scene, recognise(spoil(picture, index, blur=2.0, noise=15))).as_dict()
        for index, scene, picture in pictures(300, seed=3)
    ]
    rates = {name: np.mean([check[name] for check in checks]) for name in checks[0]}
    assert min(rates.values()) > 0.8
    assert rates["background"] == rates["position"] == 1


def test_larger_and_transparent_pictures_are_read_too():
    _, scene, picture = next(pictures(1))
    assert same(recognise(picture.resize((256, 256), Image.Resampling.BICUBIC)), scene)
    assert same(recognise(picture.convert("RGBA")), scene)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (160, 200, 240)])
def test_a_picture_without_any_thing_still_gives_a_guess(colour):
    found = recognise(Image.new("RGB", (64, 64), colour))
    assert len(found.things) >= 1


def test_compare_names_what_differs():
    drawn = Scene((Thing("star", "red", "big", "top"), Thing("ring", "blue", "small", "lower left")), "snow")
    found = recognise(render(drawn, seeded(0, "test")))
    assert compare(drawn, found).all
    other = Scene((Thing("star", "green", "big", "top"),), "sand")
    expected = {"shape": True, "colour": False, "size": True, "position": True, "background": False}
    assert compare(other, found).as_dict() == expected
    assert not compare(other, found).all
