"""Every recorded value of the published data code."""

from collections import Counter
from hashlib import sha256
from pathlib import Path

import torch

from tests.parity.data import ITEM_INPUT, compare_data, compare_pixels

FOLDER = Path(__file__).parent / "fixtures" / "data"


def test_data_equals_the_published_code():
    rows = compare_data(FOLDER)
    different = [row for row in rows if not row.equal]
    assert not different, "\n".join(str(row) for row in different[:20])
    groups = Counter(row.group for row in rows)
    assert len(rows) > 4000 and len(groups) == 24, groups
    malformed = {row.name.split()[1].split("_")[0] for row in rows if "malformed" in row.name}
    assert malformed == {"40010", "15", "16"}  # the records whose own words look like placeholders


def test_one_changed_pixel_is_a_difference():
    pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    recorded = {"sha256": sha256(pixels.numpy().tobytes()).hexdigest(), "shape": [3, 64, 64]}
    swapped = pixels.clone()
    # Neither on the recorded grid nor in the mean or the range.
    swapped[0, 1, 1], swapped[0, 1, 2] = pixels[0, 1, 2], pixels[0, 1, 1]
    kept = pixels[ITEM_INPUT]
    assert all(row.equal for row in compare_pixels("g", "n", pixels, recorded, ITEM_INPUT, kept))
    assert not all(row.equal for row in compare_pixels("g", "n", swapped, recorded, ITEM_INPUT, kept))
