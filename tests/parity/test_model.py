from pathlib import Path

import pytest

from tests.parity.model import compare_model
from tests.parity.vision import compare_lavis

FIXTURES = Path(__file__).parent / "fixtures"


def test_model_equals_the_published_code_in_every_recorded_value():
    rows = compare_model(FIXTURES / "model")
    assert [row for row in rows if not row.equal] == []
    assert len(rows) > 900


def test_vision_and_qformer_equal_lavis():
    rows = compare_lavis(FIXTURES / "lavis")
    assert [row for row in rows if not row.equal] == []
    assert len(rows) == 2


@pytest.mark.parametrize("name", ["README.md", "model/keys_stage1.json", "lavis/golden.safetensors"])
def test_fixtures_are_in_the_checkout(name):
    assert (FIXTURES / name).is_file()
