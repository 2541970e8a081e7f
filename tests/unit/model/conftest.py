"""The small model of the published code's recorded values, with its stage-1 checkpoint."""

import json
from pathlib import Path

import pytest

from minigpt5.checkpoint import load_checkpoint
from minigpt5.config import LossConfig, Stage
from minigpt5.model import MiniGPT5, build_model
from tests.parity.model import model_config

FIXTURE = Path(__file__).parents[2] / "parity" / "fixtures" / "model"


@pytest.fixture(scope="module")
def model() -> MiniGPT5:
    dims = json.loads((FIXTURE / "config.json").read_text())["dims"]
    built = build_model(model_config(FIXTURE, dims, 8), LossConfig(), Stage.ALIGNMENT)
    load_checkpoint(built, FIXTURE / "stage1.ckpt", Stage.ALIGNMENT, "--test_weight")
    return built.eval()
