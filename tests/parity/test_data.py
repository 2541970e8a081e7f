"""Every recorded value of the published data code."""

from collections import Counter
from pathlib import Path

from tests.parity.data import compare_data

FOLDER = Path(__file__).parent / "fixtures" / "data"


def test_data_equals_the_published_code():
    rows = compare_data(FOLDER)
    different = [row for row in rows if not row.equal]
    assert not different, "\n".join(str(row) for row in different[:20])
    groups = Counter(row.group for row in rows)
    assert len(rows) > 4000 and len(groups) == 24, groups
