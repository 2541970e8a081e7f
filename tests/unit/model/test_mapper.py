"""The two kinds of mapper, and what of them each stage trains."""

import dataclasses
from pathlib import Path

import pytest
import torch

from minigpt4.errors import InputError
from minigpt5.checkpoint import FORMAT_KEY, checkpoint_mark, load_checkpoint, trainable_state
from minigpt5.config import LossConfig, MapperConfig, Stage
from minigpt5.mapper import FeatureMapper
from minigpt5.model import MiniGPT5, build_model
from tests.parity.model import StageFixture, model_config

FIXTURE = Path(__file__).parents[2] / "parity" / "fixtures" / "model"


def build(stage: Stage, **changes) -> MiniGPT5:
    sizes = StageFixture(FIXTURE, 1).config["dims"]
    config = model_config(FIXTURE, sizes, 8)
    mapper = dataclasses.replace(config.mapper, **changes)
    return build_model(dataclasses.replace(config, mapper=mapper), LossConfig(), stage)


def mapper_names(model: MiniGPT5) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in trainable_state(model) if name.startswith("mapper.")}


def test_mlp_maps_each_state_and_then_the_positions():
    mapper = FeatureMapper(MapperConfig(kind="mlp", num_queries=5), vokens=3, language_width=6, diffusion_width=4)
    vokens = torch.randn(2, 3, 6)
    first, second = mapper.mlp[0], mapper.mlp[2]
    source = torch.nn.functional.gelu(vokens @ first.weight.T + first.bias) @ second.weight.T + second.bias
    expected = torch.einsum("qn,rne->rqe", mapper.positions.weight, source) + mapper.positions.bias[:, None]
    torch.testing.assert_close(mapper(vokens), expected)
    names = {name.split(".")[0] for name, _ in mapper.named_parameters()}
    assert names == {"mlp", "positions"}


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        (Stage.ALIGNMENT, {}, {"mapper.mlp", "mapper.transformer", "mapper.queries"}),
        (Stage.ALIGNMENT, {"kind": "mlp"}, {"mapper.mlp", "mapper.positions"}),
        (Stage.MULTIMODAL, {}, {"mapper.transformer"}),
        (Stage.MULTIMODAL, {"kind": "mlp"}, {"mapper.positions"}),
        (Stage.MULTIMODAL, {"stage2_trains": "whole"}, {"mapper.mlp", "mapper.transformer", "mapper.queries"}),
        (Stage.MULTIMODAL, {"kind": "mlp", "stage2_trains": "whole"}, {"mapper.mlp", "mapper.positions"}),
    ],
)
def test_what_each_stage_trains(stage, changes, expected):
    assert mapper_names(build(stage, **changes)) == expected


def test_mlp_mapper_takes_a_training_step():
    fixture = StageFixture(FIXTURE, 1)
    model = build(Stage.ALIGNMENT, kind="mlp")
    losses = model(fixture.batch, fixture.draws())
    losses.total.backward()
    assert losses.caption is not None
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def save(model: MiniGPT5, path: Path) -> Path:
    torch.save({"state_dict": trainable_state(model), FORMAT_KEY: checkpoint_mark(model.stage)}, path)
    return path


def test_a_whole_stage_2_checkpoint_needs_no_stage_1(tmp_path):
    model = build(Stage.MULTIMODAL, stage2_trains="whole")
    path = save(model, tmp_path / "whole.ckpt")
    other = build(Stage.MULTIMODAL, stage2_trains="whole")
    load_checkpoint(other, path, Stage.MULTIMODAL, "--test_weight")
    assert torch.equal(other.mapper.queries, model.mapper.queries)
    published = build(Stage.MULTIMODAL)
    load_checkpoint(published, FIXTURE / "stage1.ckpt", Stage.ALIGNMENT, "--stage1_weight")
    with pytest.raises(InputError, match=r"stage2_trains: whole are in the file alone"):
        load_checkpoint(published, path, Stage.MULTIMODAL, "--test_weight")


def test_a_checkpoint_of_the_other_kind_names_the_setting(tmp_path):
    path = save(build(Stage.ALIGNMENT, kind="mlp"), tmp_path / "mlp.ckpt")
    with pytest.raises(InputError, match=r"kind: mlp are in the file alone(.|\n)*kind: transformer are in this"):
        load_checkpoint(build(Stage.ALIGNMENT), path, Stage.ALIGNMENT, "--test_weight")
