import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.model import compare_model
from tests.parity.vision import compare_lavis

FIXTURES = Path(__file__).parent / "fixtures"


def test_model_equals_the_published_code_in_every_recorded_value():
    rows = compare_model(FIXTURES / "model")
    assert [row for row in rows if not row.equal] == []
    assert len(rows) > 900
    left = {row.name for row in rows if not row.compared}
    assert left == {"init.lm_head_new_rows"}


def test_vision_and_qformer_equal_lavis():
    rows = compare_lavis(FIXTURES / "lavis")
    assert [row for row in rows if not row.equal] == []
    assert len(rows) == 2


@pytest.mark.parametrize("name", ["README.md", "model/keys_stage1.json", "lavis/golden.safetensors"])
def test_fixtures_are_in_the_checkout(name):
    assert (FIXTURES / name).is_file()


def test_an_unknown_recorded_value_is_counted_and_a_wrong_one_is_a_difference(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "model", folder)
    golden = load_file(folder / "golden_stage1.safetensors")
    golden["main.something_new"] = torch.zeros(1)
    golden["gen.0.free.sequences"] = torch.full_like(golden["gen.0.free.sequences"], 7)
    save_file(golden, folder / "golden_stage1.safetensors")
    rows = compare_model(folder)
    assert {row.name for row in rows if not row.compared} == {"init.lm_head_new_rows", "main.something_new"}
    assert [row.name for row in rows if not row.equal] == ["gen.0.free.sequences (tensor)"]
