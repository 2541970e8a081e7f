"""Padding, transforms and unreadable pictures; the published values are held by the parity tests."""

import pytest
import torch
from data_helpers import draw
from PIL import Image

from minigpt4.errors import InputError
from minigpt5.images import expand2square, input_transform, open_picture, output_transform


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"\xff\xd8\xff\xe0"])
def test_an_unreadable_picture_is_named(tmp_path, content):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.jpg: not a readable picture"):
        open_picture(path)


def test_a_truncated_and_a_missing_picture_are_named(tmp_path):
    path = draw(tmp_path / "cut.png", size=(64, 64))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"cut\.png: not a readable picture"):
        open_picture(path)
    with pytest.raises(InputError, match=r"none\.png: no such picture"):
        open_picture(tmp_path / "none.png")


def test_only_wanted_pictures_are_padded_to_a_square():
    picture = Image.new("RGB", (8, 4), (0, 0, 0))
    wanted = output_transform(8)(picture)
    assert wanted.shape == (3, 8, 8)
    assert torch.equal(wanted[:, 2:6], -torch.ones(3, 4, 8)) and torch.equal(wanted[:, :2], torch.ones(3, 2, 8))
    assert torch.equal(output_transform(8, normalize=False)(picture), (wanted + 1) / 2)
    assert input_transform(8)(picture).max() < -1  # black everywhere: nothing was padded with white


def test_expand2square_keeps_the_mode_and_squares():
    square = Image.new("L", (3, 3))
    assert expand2square(square) is square
    assert expand2square(Image.new("RGB", (5, 2))).size == (5, 5)


def test_the_generator_alone_decides_about_mirroring(tmp_path):
    picture = open_picture(draw(tmp_path / "a.png", size=(8, 8)))
    plain = output_transform(8)(picture)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    outcomes = [output_transform(8)(picture, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert torch.equal(torch.get_rng_state(), state)
    mirrored = [torch.equal(outcome, plain.flip(-1)) for outcome in outcomes]
    assert all(was or torch.equal(o, plain) for was, o in zip(mirrored, outcomes, strict=True))
    assert any(mirrored) and not all(mirrored)


def test_the_key_tells_transforms_apart():
    keys = {output_transform(8).key, output_transform(16).key, output_transform(8, normalize=False).key}
    assert len(keys | {input_transform(8).key}) == 4
