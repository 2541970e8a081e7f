import pytest

from minigpt5.config import MetricsConfig
from tests.unit.metrics.small_store import MODELS


@pytest.fixture
def networks() -> MetricsConfig:
    return MetricsConfig(
        clip_model=str(MODELS / "clip_tiny"),
        fid_network=str(MODELS / "fid_features.safetensors"),
        inception_network=str(MODELS / "is_features.safetensors"),
        sentence_encoder="clip",
        device="cpu",
    )
