"""Other precisions and attention kernels give the same model."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from minigpt5.config import LossConfig, Stage
from minigpt5.losses import Losses
from minigpt5.model import MiniGPT5, build_model
from tests.parity.model import StageFixture, model_config

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures" / "model"


@pytest.fixture(scope="module", params=[1, 2], ids=["stage1", "stage2"])
def fixture(request) -> StageFixture:
    return StageFixture(FIXTURES, request.param)


def losses(fixture: StageFixture, model: MiniGPT5) -> Losses:
    with torch.no_grad():
        return model(fixture.batch, fixture.draws())


def agree(ours: Losses, reference: Losses, tolerance: float) -> None:
    for name, value in reference.as_dict().items():
        relative = abs(ours.as_dict()[name].item() / value.item() - 1)
        assert relative < tolerance, f"{name}: {ours.as_dict()[name].item()} against {value.item()}"


def test_autocast_to_bfloat16_stays_within_two_percent(fixture):
    reference = losses(fixture, fixture.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(losses(fixture, fixture.model), reference, 0.02)


def test_frozen_parts_in_bfloat16_stay_within_two_percent(fixture):
    dims = json.loads((FIXTURES / "config.json").read_text())["dims"]
    half = build_model(model_config(FIXTURES, dims, 8), LossConfig(), fixture.stage, torch.bfloat16).eval()
    trained = dict(fixture.model.named_parameters())
    with torch.no_grad():
        for name, parameter in half.named_parameters():
            parameter.copy_(trained[name])
    assert half.rows.embedding.dtype is torch.float32
    assert half.backbone.projection.weight.dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(losses(fixture, half), losses(fixture, fixture.model), 0.02)


def test_eager_and_fused_attention_agree(fixture):
    reference = losses(fixture, fixture.model)
    llama = fixture.model.backbone.language_model
    parts = [llama, fixture.model.backbone.vision.model, fixture.model.backbone.qformer.model]
    for part in parts:
        assert part.config._attn_implementation == "sdpa"
        part.set_attn_implementation("eager")
    try:
        agree(losses(fixture, fixture.model), reference, 1e-5)
    finally:
        for part in parts:
            part.set_attn_implementation("sdpa")


def test_compiled_model_agrees():
    fixture = StageFixture(FIXTURES, 1)
    reference = fixture.model(fixture.batch, fixture.draws())
    reference.total.backward()
    expected = fixture.model.mapper.queries.grad.clone()
    fixture.model.zero_grad()
    # graph capture and its backward pass; generating code for a whole UNet takes minutes on a CPU
    fixture.model.compile_parts(backend="aot_eager")
    compiled = fixture.model(fixture.batch, fixture.draws())
    compiled.total.backward()
    agree(compiled, reference, 1e-4)
    torch.testing.assert_close(fixture.model.mapper.queries.grad, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.compiler
def test_generated_code_of_the_mapper_agrees():
    mapper = StageFixture(FIXTURES, 1).model.mapper
    vokens = torch.randn(3, 8, 64)
    expected = mapper(vokens)
    mapper.compile()
    torch.testing.assert_close(mapper(vokens), expected, rtol=1e-4, atol=1e-5)


def test_gradients_under_autocast_point_the_same_way(fixture):
    model = fixture.model
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(fixture.batch, fixture.draws()).total.backward()
        named = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(named))
    cosine = torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0)
    assert cosine > 0.98


def test_losses_name_what_they_hold(fixture):
    terms = losses(fixture, fixture.model).as_dict()
    assert set(terms) == {"loss", "text_loss", "image_loss", "caption_loss"}
    uncaptioned = [dataclasses.replace(sample, caption=None) for sample in fixture.batch.samples]
    batch = dataclasses.replace(fixture.batch, samples=uncaptioned)
    assert "caption_loss" not in fixture.model(batch, fixture.draws()).as_dict()
    assert fixture.stage in (Stage.ALIGNMENT, Stage.MULTIMODAL)
