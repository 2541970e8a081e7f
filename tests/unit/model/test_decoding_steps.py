"""Compiled steps of decoding read what growing ones read."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minigpt5.adapters import Prefix
from minigpt5.config import GenerationConfig
from minigpt5.decoding_steps import CompiledSteps, GrowingSteps
from minigpt5.kv_cache import fixed_room

FIXTURE = Path(__file__).parents[2] / "parity" / "fixtures" / "model"
WIDTHS = (1, 1, 8, *[1] * 20)


class Capture:
    """A compiler that runs the captured graphs as they are; tests/gpu generates code."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward


def prompts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(len(lengths), max(lengths), 64)
    mask = torch.tensor([[0] * (max(lengths) - length) + [1] * length for length in lengths])
    return hidden * mask[..., None], mask


@pytest.mark.parametrize("prefix_length", [0, 3])
@torch.no_grad()
def test_compiled_steps_give_the_states_of_growing_ones(model, prefix_length, monkeypatch):
    monkeypatch.setattr("minigpt5.kv_cache._LEAST_FIXED_ROOM", 8)
    torch.manual_seed(0)
    llama = model.backbone.language_model
    prefix = Prefix(llama.config, prefix_length) if prefix_length else None
    capture, caches = Capture(), []
    compiled = CompiledSteps(llama, prefix, capture)
    for lengths in ((9, 4), (5, 7), (6,)):
        growing = GrowingSteps(llama, prefix)
        hidden, mask = prompts(*lengths)
        read = mask.bool()
        expected = growing.begin(hidden, mask, 4)[read]
        torch.testing.assert_close(compiled.begin(hidden, mask, 4)[read], expected, rtol=1e-4, atol=1e-5)
        for width in WIDTHS:
            hidden = torch.randn(len(lengths), width, 64)
            torch.testing.assert_close(compiled.go_on(hidden), growing.go_on(hidden), rtol=1e-4, atol=1e-5)
        caches.append(compiled._cache)
    assert [cache.layers[0].keys.shape[2] for cache in caches] == [64, 64, 64]
    assert caches[0] is caches[1] is not caches[2]
    # one whole graph each: two prompts in rooms of 16, 32 and 64, and one prompt in the same
    assert capture.graphs == 6


@torch.no_grad()
def test_room_that_was_enough_for_more_serves_less(model):
    compiled = CompiledSteps(model.backbone.language_model, backend=Capture())
    addresses = set()
    for new_positions in (300, 3, 400, 20):
        compiled.begin(*prompts(5, 3), new_positions)
        addresses.add(compiled._cache.layers[0].keys.data_ptr())
    assert len(addresses) == 1


@torch.no_grad()
def test_decoding_runs_in_no_graph_of_training(model):
    """Each length would add one, until torch compiles no more; and a cache made in a graph makes no CUDA graph."""
    capture = Capture()
    llama = model.backbone.language_model
    llama.model.compile(backend=capture)
    try:
        growing, compiled = GrowingSteps(llama), CompiledSteps(llama, backend=Capture())
        for steps in (growing, compiled):
            steps.begin(*prompts(5), 4)
            steps.go_on(torch.randn(1, 8, 64))
        assert capture.graphs == 0
        assert hasattr(compiled._cache.layers[0].keys, "_dynamo_static_input_type")
        compiled.go_on(torch.randn(1, 1, 64))
        llama.model(inputs_embeds=torch.randn(1, 5, 64))
        assert capture.graphs > 0
    finally:
        llama.model._compiled_call_impl = None


def test_a_copy_steps_with_its_own_weights(model):
    config = GenerationConfig(compile=True)
    assert model._steps(config.compile) is model._steps(config.compile)
    other = copy.deepcopy(model)
    assert other._steps(True)._model is other.backbone.language_model.model
    model._compiled_steps = None


@torch.no_grad()
def test_states_of_a_compiled_step_stay_when_the_next_is_made(model):
    compiled = CompiledSteps(model.backbone.language_model, backend=Capture())
    compiled.begin(*prompts(5, 3), 4)
    kept = compiled.go_on(torch.randn(2, 1, 64))
    before = kept.clone()
    compiled.go_on(torch.randn(2, 1, 64))
    assert torch.equal(kept, before)


@pytest.mark.parametrize(("positions", "room"), [(1, 256), (256, 256), (257, 512), (1025, 2048)])
def test_fixed_rooms_are_few(positions, room):
    assert fixed_room(positions) == room
