"""The benchmarks compare equals, and write down what they find."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import data, floor, generate, harness, load, metric, reference, run, train
from benchmarks.harness import Row, Settings, alternate, assert_close
from minigpt4.errors import InputError
from minigpt5.cli import run_command
from minigpt5.config import PROJECT_ROOT, Stage, load_config
from minigpt5.model import build_random


def settings(suite: str) -> Settings:
    return Settings(suite, "tiny", 1, 0, torch.device("cpu"), torch.get_num_threads())


@pytest.mark.parametrize("case", train.CASES.values(), ids=list(train.CASES))
def test_our_training_steps_are_the_reference_paths(case):
    line = train._Paths(settings("train"), case).check_equal()
    assert line.startswith("losses of 3 steps")


def test_what_is_no_number_is_not_equal():
    assert "largest relative difference 1.0e-01" in assert_close("losses", [1.0, 2.0], [1.1, 2.0], 0.2)
    for first, second in (([1.0], [1.3]), ([math.nan], [1.0]), ([1.0, 1.0], [1.0, math.nan])):
        with pytest.raises(AssertionError, match="losses: the paths differ"):
            assert_close("losses", first, second, 0.2)


def test_a_reply_that_ends_early_is_not_timed(monkeypatch):
    for name, value in {"BATCH_SIZE": 1, "NEW_TOKENS": 12, "STEPS": 1}.items():
        monkeypatch.setattr(generate, name, value)
    paths = generate._Paths(settings("generate"))
    paths.config = replace(paths.config, max_new_tokens=4)
    with pytest.raises(AssertionError, match="ended by itself after"):
        paths.check_equal()


def test_our_batched_replies_are_the_reference_paths_one_by_one(monkeypatch):
    for name, value in {"BATCH_SIZE": 3, "NEW_TOKENS": 12, "STEPS": 2}.items():
        monkeypatch.setattr(generate, name, value)
    paths = generate._Paths(settings("generate"))
    assert "tokens of 3 of 3 replies; states along the same tokens" in paths.check_equal()
    # what the layers are off by is found along the very tokens
    paths.published.backbone.language_model.model.layers[0].mlp.down_proj.weight.data *= 1.05
    with pytest.raises(AssertionError, match="tokens differ|states along the same tokens differ"):
        paths.check_equal()


def test_reference_path_decodes_in_bfloat16(monkeypatch):
    """As it does on a GPU, where the frozen parts have that type and the trained matrices float32."""
    monkeypatch.setattr(generate, "NEW_TOKENS", 4)
    paths = generate._Paths(settings("generate"), only="ours")
    paths.model.backbone.to(torch.bfloat16)
    published = reference.ReferenceModel(paths.model)
    tokens, (states,), _ = published.decode(paths.requests[0], paths.config)
    assert tokens[1] == paths.model.voken_ids.first and states.dtype is torch.bfloat16


def test_ratio_is_above_one_where_ours_is_better():
    assert Row("time", "s", reference=2.0, ours=1.0).ratio == 2.0
    assert Row("rate", "1/s", reference=1.0, ours=2.0, higher_is_better=True).ratio == 2.0
    assert Row("alone", "s", reference=None, ours=1.0).ratio is None


def test_paths_take_turns_and_the_first_round_does_not_count():
    order = []

    def path(name, seconds):
        values = iter(seconds)

        def run():
            order.append(name)
            return {"total": next(values)}

        return run

    medians = alternate({"a": path("a", [9, 1, 2, 3]), "b": path("b", [9, 4, 4, 5])}, repeats=3)
    assert order == ["a", "b"] * 4
    assert medians == {"a": {"total": 2}, "b": {"total": 4}}


@pytest.mark.slow
def test_paths_take_turns_each_in_a_process_of_its_own():
    paths = {path: f"captions:{path}" for path in ("reference", "live", "reference_cached", "cached")}
    medians, printed = harness.alternate_alone(settings("train"), paths)
    for path in paths:
        phases = medians[path]
        assert phases["total"] == pytest.approx(sum(phases[name] for name in ("forward", "backward", "optimizer")))
        assert printed[path]["peak"] > printed[path]["beyond_imports"] > 0


def test_a_worker_that_fails_says_why():
    with harness.Worker(settings("metric"), "anything") as worker:
        with pytest.raises(RuntimeError, match="--alone anything failed:\nTraceback"):
            worker.step()
        with pytest.raises(RuntimeError, match="has no attribute 'measure_alone'"):
            worker.finish()


def test_a_forgotten_peak_does_not_count():
    device = torch.device("cpu")
    block = torch.ones(2**26)
    high = harness.peak_bytes(device)
    del block
    harness.forget_peak(device)
    assert harness.peak_bytes(device) < high - 2**27


def test_floor_refuses_a_response_longer_than_its_sample(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["floor.py", "--response", "50"])
    with pytest.raises(SystemExit):
        floor.main()
    assert "--response 50 --tokens 40: the response is a part" in capsys.readouterr().err


def test_counted_floor_of_a_small_model():
    config = load_config(PROJECT_ROOT / "config" / "tiny.yaml", {}, {})
    with torch.device("meta"):
        model = build_random(config.model, config.loss, Stage.ALIGNMENT)
        layers = sum(parameter.numel() for parameter in model.backbone.language_model.model.layers.parameters())
        parts = {part.name: part for part in floor.count_step(model, 2, 40, 10, 1)}
    products = 2 * 2 * 30 * layers
    counted = parts["LLaMA forward, constants"].flop
    assert products * 0.99 < counted < products * 1.1  # attention's own products come on top
    rest = 2 * 2 * 10 * layers
    for name in ("LLaMA forward, rest", "LLaMA backward, rest (inputs only)"):
        assert rest * 0.99 < parts[name].flop < rest * 1.2, name
    forward, backward = (parts[f"UNet {name}"].flop for name in ("forward", "backward (inputs only)"))
    assert 0.8 * forward < backward < 1.3 * forward  # without its weights' gradients, which would double it
    assert "ViT and Q-Former" in parts


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--repeats", "0"], "--repeats 0: give at least 1"),
        (["--threads", "0"], "--threads 0: give at least 1"),
        (["--device", "foo"], "--device: 'foo' cannot be used here"),
        (["--out", __file__], "cannot be made a folder"),
    ],
)
def test_bad_flags_are_told_before_anything_is_measured(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(metric, "measure", lambda settings: pytest.fail("measured"))
    threads = ["--threads", str(torch.get_num_threads())]
    assert run_command(run.main, ["--suite", "metric", "--preset", "tiny", *threads, *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and words in message and message.count("\n") == 1


@pytest.mark.parametrize(("suite", "rounds", "words"), [(data, 2, "median of 2"), (load, 1, "one round")])
def test_suites_tell_how_many_rounds_they_ran(suite, rounds, words, tmp_path, monkeypatch, capsys):
    calls = []
    values = {"seconds": 1.0, "peak": 1, "random": 1.0, "anonymous": 1, "digest": 0}
    monkeypatch.setattr(suite, "in_child", lambda settings, path: calls.append(path) or values)
    monkeypatch.setattr(suite, "_write", lambda *_: 1)
    report = suite.measure(replace(settings(suite.__name__), repeats=5))
    harness.print_table(report)
    assert words in capsys.readouterr().out
    assert json.loads(harness.write_json(report, tmp_path).read_text())["rounds"] == rounds
    assert len({calls.count(path) for path in calls}) == 1 and calls.count(calls[0]) == rounds


def test_a_suite_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def fail(settings):
        raise AssertionError("the paths differ")

    for suite in (train, generate, load, data, metric):
        monkeypatch.setattr(suite, "measure", harness.Report)
    monkeypatch.setattr(generate, "measure", fail)
    flags = ["--preset", "tiny", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="--suite all: generate failed"):
        run.main(flags)
    assert "the paths differ" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.json"))) == 4
    with pytest.raises(AssertionError, match="the paths differ"):
        run.main([*flags, "--suite", "generate"])


def test_loading_asks_for_room_before_it_writes(monkeypatch):
    monkeypatch.setattr(load.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
    with pytest.raises(InputError, match="let TMPDIR name a folder with more room"):
        load.measure(settings("load"))


@pytest.mark.slow
def test_a_suite_prints_its_table_and_writes_machine_versions_and_seed(tmp_path):
    command = [sys.executable, str(PROJECT_ROOT / "benchmarks" / "run.py"), "--suite", "metric"]
    command += [
        "--preset",
        "tiny",
        "--repeats",
        "1",
        "--seed",
        "3",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "CLIP similarities" in finished.stdout
    (path,) = tmp_path.glob("*-metric-tiny-cpu.json")
    content = json.loads(path.read_text())
    assert content["seed"] == 3 and content["equal"]
    assert {"processor", "threads", "packages"} <= content["machine"].keys()
    assert content["rows"][0]["ratio"] > 0
