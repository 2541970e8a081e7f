"""What makes a training step lean changes none of its gradients."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from minigpt5.config import TrainingConfig
from minigpt5.data.types import Batch
from minigpt5.training import TrainingModule, build_optimizer, recompute_activations
from minigpt5.vokens import IGNORE_INDEX
from tests.parity.model import StageFixture

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures" / "model"


@pytest.fixture(params=[1, 2], ids=["stage1", "stage2"])
def fixture(request) -> StageFixture:
    return StageFixture(FIXTURES, request.param)


def gradients(fixture: StageFixture, batch: Batch | None = None, runs: int | None = None):
    model = fixture.model
    model.zero_grad()
    draws = fixture.draws() if runs is None else fixture.draws([False] * runs)
    model(batch or fixture.batch, draws).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_equal_gradients(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_running_constant_positions_without_a_graph_changes_no_gradient():
    fixture = StageFixture(FIXTURES, 1)
    lengths = []
    layer = fixture.model.backbone.language_model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: lengths.append((args[0].shape[1], torch.is_grad_enabled())))
    split = gradients(fixture)
    # A frozen language model is recognised by its parameters; one that trains makes every position depend on it.
    norm = fixture.model.backbone.language_model.model.norm.weight.requires_grad_(True)
    whole = gradients(fixture)
    assert whole.pop("backbone.language_model.model.norm.weight").abs().sum() > 0
    norm.requires_grad_(False)
    (constant, without), (rest, with_graph), (every, _) = lengths
    assert (without, with_graph) == (False, True)
    assert rest < every // 10 and constant <= every
    assert_equal_gradients(split, whole)


def test_samples_that_begin_their_vokens_anywhere_share_a_batch():
    """One sample begins with its vokens, one holds none, one has nothing behind them."""
    fixture = StageFixture(FIXTURES, 1)
    model, batch = fixture.model, fixture.batch
    ids, labels = batch.input_ids_BT.clone(), batch.labels_BT.clone()
    vokens = torch.tensor(model.voken_ids.vokens)
    length = ids.shape[1]
    mask = torch.zeros_like(ids)
    ids[:, :], labels[:, :] = 40, -100
    for row, (start, end) in enumerate([(0, 12), (None, length), (length - len(vokens), length)]):
        mask[row, :end] = 1
        if start is not None:
            ids[row, start : start + len(vokens)] = labels[row, start : start + len(vokens)] = vokens
        labels[row, 4] = 50
    rows = 3
    batch = Batch(
        samples=batch.samples[:rows],
        input_ids_BT=ids[:rows],
        attention_mask_BT=mask[:rows],
        labels_BT=labels[:rows],
        input_counts=[0] * rows,
        output_counts=[1, 0, 1],
        output_pixels_O3HW=batch.output_pixels_O3HW[:2],
    )
    draws = model.draw(batch, seed=0, epoch=0, training=True)

    def step():
        model.zero_grad()
        losses = model(batch, draws)
        losses.total.backward()
        return losses.total.item(), model.rows.embedding.grad.clone(), model.mapper.queries.grad.clone()

    split = step()
    model.backbone.language_model.model.norm.weight.requires_grad_(True)
    for ours, whole in zip(split, step(), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-7)


def test_logits_are_taken_where_there_is_a_label_and_nowhere_else(fixture, monkeypatch):
    model, taken = fixture.model, []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden_XH: taken.append(len(hidden_XH)) or logits(hidden_XH))
    model(fixture.batch, fixture.draws())
    labels = fixture.batch.labels_BT
    assert taken == [int((labels != IGNORE_INDEX).sum())]
    assert taken[0] < labels.numel() / 4


def test_a_batch_without_pictures_has_a_gradient_for_everything_that_trains(fixture):
    found = gradients(fixture, fixture.text_only, runs=0)
    trainable = {name for name, parameter in fixture.model.named_parameters() if parameter.requires_grad}
    assert found.keys() == trainable
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all()
        if name.startswith("mapper."):
            assert not gradient.any(), name


def test_recomputed_activations_give_the_same_gradients(fixture):
    fixture.model.train()
    for module in fixture.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    kept = gradients(fixture)
    recompute_activations(fixture.model)
    assert_equal_gradients(gradients(fixture), kept)


def test_fused_adamw_takes_the_same_steps(fixture):
    other = copy.deepcopy(fixture.model)
    config = TrainingConfig()
    fused = build_optimizer(fixture.model, config)
    plain = build_optimizer(other, dataclasses.replace(config, precision="16-mixed"))
    assert (fused.defaults["fused"], plain.defaults["fused"]) == (True, False)
    found = gradients(fixture)
    for model, optimizer in ((fixture.model, fused), (other, plain)):
        for name, parameter in model.named_parameters():
            parameter.grad = found[name].clone() if name in found else None
        for _ in range(3):
            optimizer.step()
    for (name, ours), theirs in zip(fixture.model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8, msg=name)


def test_cached_features_in_bfloat16_train_a_model_in_float32(fixture):
    """The feature cache is written in bfloat16, whatever the run's precision is."""
    model, batch = fixture.model, fixture.batch
    with torch.no_grad():
        features = model.backbone.encode_images(batch.input_pixels_P3HW).bfloat16()
        moments = model.diffusion.encode_pixels(batch.output_pixels_O3HW).bfloat16()
    cached = dataclasses.replace(
        batch,
        input_pixels_P3HW=None,
        output_pixels_O3HW=None,
        input_features_PLH=features,
        output_moments_OCHW=moments,
    )
    live = model(batch, fixture.draws()).total.item()
    assert model(cached, fixture.draws()).total.item() == pytest.approx(live, rel=0.02)


def test_the_end_of_training_copies_nothing_to_the_host(fixture):
    """Lightning calls ``cpu`` there; the meta device, from which nothing can be copied, stands for a GPU."""
    module = TrainingModule(fixture.model.to("meta"), TrainingConfig(), 1, {})
    assert module.cpu() is module
    assert module.model.rows.embedding.is_meta
