"""What the machine can do, and what a call asks of it: figures that shares are taken of."""

import pytest
import torch

from benchmarks import generate, limits, train, worlds
from benchmarks.harness import Report, Settings
from minigpt5.config import Stage

CPU = torch.device("cpu")


def settings(suite: str) -> Settings:
    return Settings(suite, "tiny", 1, 0, CPU, torch.get_num_threads())


def test_backward_passes_are_counted():
    layer = torch.nn.Linear(30, 20)
    forward = 2 * 5 * 30 * 20
    assert limits.flop_of(lambda: layer(torch.ones(5, 30))) == forward
    # of the input's gradient and the weight's, only the latter is needed
    assert limits.flop_of(lambda: layer(torch.ones(5, 30)).sum().backward()) == 2 * forward


def test_rates_follow_the_clock(monkeypatch):
    """Each round takes half a second by this clock."""
    seconds = iter(half / 2 for half in range(1000))
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setitem(limits.SIDE, "cpu", 8)
    monkeypatch.setitem(limits.COPIED, "cpu", 100)
    assert limits.product_rate(CPU, torch.float32) == 2 * 8**3 / 0.5
    assert limits.bandwidth(CPU) == 2 * 100 / 0.5


def test_a_step_of_decoding_reads_the_layers_and_the_head():
    paths = generate._Paths(settings("generate"))
    llama = paths.model.backbone.language_model
    embedding = llama.get_input_embeddings().weight
    assert paths.bytes_per_token() == sum(p.nbytes for p in llama.parameters()) - embedding.nbytes


@pytest.mark.slow
def test_training_is_compared_with_the_rate_of_matrix_products(monkeypatch):
    monkeypatch.setattr(limits, "product_rate", lambda device, dtype: 1e12)
    phases = dict.fromkeys(("forward", "backward", "optimizer", "total"), 2.0)
    memory = {"peak": 1.0, "beyond_imports": 1.0}
    monkeypatch.setattr(
        train, "alternate_alone", lambda _, paths: (dict.fromkeys(paths, phases), dict.fromkeys(paths, memory))
    )
    report = Report(settings("train"))
    train._measure_case(report, "stage1", train.CASES["stage1"])
    rows = {row.name: row for row in report.rows}
    # weights once, gradients and moments of what trains, and activations
    weights = 4 * sum(
        parameter.numel() for parameter in worlds.open_world("tiny", Stage.ALIGNMENT, CPU, 0).model.parameters()
    )
    assert weights < rows["stage1 peak memory that --plan tells, live"].ours * 2**20 < 3 * weights
    flop = {}
    for path, rate in (("live", "stage1 live"), ("cached", "stage1 feature cache")):
        row = rows[f"stage1 {path}, of the rate of matrix products"]
        assert row.note == "of 1 TFLOP/s"
        flop[path] = row.ours * train.BATCH_SIZE / rows[rate].ours * 1e12
    # neither the vision encoder nor the VAE runs over cached features
    assert 1e9 < flop["cached"] < 0.9 * flop["live"]
