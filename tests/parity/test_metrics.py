"""Every figure of the published evaluation, to its tolerance."""

from pathlib import Path

from tests.parity.metrics import compare_metrics

FOLDER = Path(__file__).parent / "fixtures" / "data" / "metrics"


def test_metrics_equal_the_published_figures():
    rows = compare_metrics(FOLDER)
    different = [row for row in rows if not row.equal]
    assert not different, "\n".join(str(row) for row in different)
    assert len(rows) > 50
