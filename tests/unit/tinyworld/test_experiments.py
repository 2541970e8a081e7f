"""The comparisons' command: what it runs once, what again, and what it makes of failures."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from scipy import stats

from minigpt4.errors import InputError
from minigpt5.config import PROJECT_ROOT
from minigpt5.hardware import Hardware
from minigpt5.tinyworld.__main__ import main
from minigpt5.tinyworld.experiments import plan as plans
from minigpt5.tinyworld.experiments.comparisons import CAPTIONS, COMPARISONS, STORIES, Comparison, Sizes, Variant
from minigpt5.tinyworld.experiments.intervals import Interval, mean_interval
from minigpt5.tinyworld.experiments.jobs import Job, JobsInterrupted, run_jobs
from minigpt5.tinyworld.experiments.plan import Plan
from minigpt5.tinyworld.experiments.report import collect, counted, draw, table
from minigpt5.tinyworld.experiments.run import alone_in, plan_jobs, run_experiments
from minigpt5.tinyworld.quality import MEANINGS

TINY = Sizes(captions=4, stories=1, held_out=2, steps=(2, 2), batch_size=2)
FEW_STEPS = {"generation.num_inference_steps": 1, "generation.max_new_tokens": 4}


# ---- intervals and plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.1, 0.4], [0.2, 0.25, 0.9], [0.5] * 3 + [0.6], [0.0, 1.0, 0.5, 0.25, 0.3]])
def test_interval_is_that_of_scipys_t_test(values):
    found = mean_interval(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found.count == len(values)
    assert found.mean - found.half == pytest.approx(expected.low)
    assert found.mean + found.half == pytest.approx(expected.high)


def test_one_value_has_no_interval():
    assert str(mean_interval([0.256])) == "25.6"
    assert str(mean_interval([0.2, 0.4])) == "30.0 ± 127.1"
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    return Plan(tmp_path_factory.mktemp("plan"), TINY)


@pytest.mark.parametrize("comparison", COMPARISONS.values(), ids=list(COMPARISONS))
def test_every_variant_is_a_valid_run_unlike_the_others(plan, comparison):
    cells = plan.cells(comparison, 1)
    assert len({cell.prediction.key for cell in cells}) == len({cell.path for cell in cells}) == len(cells)
    assert set(comparison.measures) <= set(MEANINGS)
    for cell in cells:
        prediction = cell.prediction
        assert prediction.config.test_weight == prediction.training.checkpoint
        assert prediction.config.model == prediction.training.config.model
        assert prediction.config.data.context == prediction.training.config.data.context
        assert prediction.config.data.folder != prediction.training.config.data.folder


def test_main_comparisons_have_three_seeds():
    main_ones = {"guidance", "caption_loss", "diffusion_loss", "vokens", "stages", "context"}
    assert {name: comparison.seeds for name, comparison in COMPARISONS.items()} == {
        name: 3 if name in main_ones else 1 for name in COMPARISONS
    }


def test_cells_share_what_is_trained_alike(plan):
    guidance = plan.cells(COMPARISONS["guidance"], 2)
    assert len({cell.prediction.training.key for cell in guidance}) == 4  # with and without, two seeds
    baselines = [
        plan.cells(COMPARISONS[name], 1)[place].prediction
        for name, place in (("stages", 0), ("context", 3), ("adapter", 0), ("label_loss", 0))
    ]
    assert len({prediction.key for prediction in baselines}) == 1
    stage1 = baselines[0].training.start
    assert stage1.key == guidance[0].prediction.training.key
    jobs = plan_jobs(plan.cells(COMPARISONS["context"], 1), plan.folder / "logs")
    assert len(jobs) == 1 + 4 + 4
    assert jobs[0].key == stage1.key
    alone = plan.cells(COMPARISONS["stages"], 1)[2].prediction.training
    assert (alone.start, alone.config.training.max_steps) == (None, 4)


def test_only_the_second_stage_has_its_learning_rate(plan):
    second = plan.cells(COMPARISONS["stages"], 1)[0].prediction.training
    assert second.config.training.learning_rate == TINY.stage2_rate
    assert second.start.config.training.learning_rate > TINY.stage2_rate


def test_keys_depend_on_settings_and_sizes_but_not_on_folders(plan, tmp_path):
    (cell,) = plan.cells(Comparison("x", "X", STORIES, ("modality",), (Variant("one"),)), 1)

    def keys(sizes=TINY, folder=plan.folder, **changes):
        variant = Variant("one", **changes)
        (other,) = Plan(folder, sizes).cells(Comparison("x", "X", STORIES, ("modality",), (variant,)), 1)
        training = other.prediction.training
        return training.start.key, training.key, other.prediction.key

    first, second, replies = keys()
    assert replies == cell.prediction.key
    assert keys(folder=tmp_path) == (first, second, replies)
    assert keys(predicting={"generation.guidance_scale": 2.0})[:2] == (first, second)
    assert keys(predicting={"generation.guidance_scale": 2.0})[2] != replies
    assert keys(sizes=replace(TINY, held_out=3))[:2] == (first, second)
    changed = keys(sizes=replace(TINY, steps=(2, 3)))
    assert changed[0] == first and changed[1] != second and changed[2] != replies
    changed = keys(both={"loss.min_snr_gamma": None})
    assert changed[0] != first and changed[1] != second and changed[2] != replies


def test_keys_depend_on_the_precision_that_the_machine_has(plan, monkeypatch):
    (cell,) = plan.cells(COMPARISONS["context"], 1)[:1]
    monkeypatch.setattr(plans, "choose_hardware", lambda training: Hardware((0,), "bf16-mixed"))
    (elsewhere,) = Plan(plan.folder, TINY).cells(COMPARISONS["context"], 1)[:1]
    assert elsewhere.prediction.training.key != cell.prediction.training.key
    assert elsewhere.prediction.key != cell.prediction.key


# ---- jobs --------------------------------------------------------------------------------------------------


def touch(path: Path) -> None:
    print("about to touch")
    path.touch()


def fail() -> None:
    raise InputError("no such thing\nwith a second line")


def die() -> None:
    os._exit(3)


def interrupt() -> None:
    raise KeyboardInterrupt


def job(folder: Path, key: str, work=None, needs: str | None = None) -> Job:
    return Job(key, f"job {key}", work or partial(touch, folder / key), folder / f"{key}.log", needs)


def test_only_weights_that_a_stage_uses_are_in_its_keys(tmp_path, monkeypatch):
    weights, config = tmp_path / "weights", tmp_path / "config" / "tiny.yaml"
    shutil.copytree(plans.TINY.parent.parent / "minigpt5/tinyworld/weights", weights)
    config.parent.mkdir()
    config.write_text(plans.TINY.read_text().replace("../minigpt5/tinyworld/weights", str(weights)))
    monkeypatch.setattr(plans, "TINY", config)

    def keys() -> list[str]:
        cells = [Plan(tmp_path / "out", TINY).cells(COMPARISONS[name], 1)[0] for name in ("vokens", "context")]
        return [cell.prediction.training.key for cell in cells]

    captions, stories = keys()
    (weights / "eva_vit.pth").write_bytes(b"other")
    assert keys()[0] == captions
    assert keys()[1] != stories
    (weights / "llama" / "model.safetensors").write_bytes(b"other")
    assert keys()[0] != captions


def test_a_failed_job_stops_only_what_needs_it(tmp_path, capsys):
    jobs = [
        job(tmp_path, "a", fail),
        job(tmp_path, "b", needs="a"),
        job(tmp_path, "c"),
        job(tmp_path, "d", needs="c"),
    ]
    failures = run_jobs(jobs, 1)
    assert failures.keys() == {"a", "b"}
    assert failures["b"] == failures["a"] == f"InputError: no such thing (see {tmp_path / 'a.log'})"
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "c").exists() and (tmp_path / "d").exists()
    assert "with a second line" in (tmp_path / "a.log").read_text()
    assert (tmp_path / "c.log").read_text() == "about to touch\n"
    shown = capsys.readouterr().err
    assert "job a: FAILED" in shown and "[4/4] job d: done" in shown


def test_an_interruption_names_what_was_being_done(tmp_path):
    jobs = [job(tmp_path, "a", fail), job(tmp_path, "b", interrupt), job(tmp_path, "c")]
    with pytest.raises(JobsInterrupted) as stopped:
        run_jobs(jobs, 1)
    assert stopped.value.failures["b"] == "interrupted"
    assert stopped.value.failures.keys() == {"a", "b"}


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_job_along(tmp_path):
    jobs = [job(tmp_path, "a", die), job(tmp_path, "b", needs="a"), *(job(tmp_path, key) for key in "cdef")]
    failures = run_jobs(jobs, 2)
    assert {"a", "b"} <= failures.keys()
    assert "its process ended" in failures["a"]
    # What ran beside it may be lost with it, nothing else.
    done = {key for key in "cdef" if (tmp_path / key).exists()}
    assert len(done) >= 3 and len(failures) <= 3


# ---- end to end --------------------------------------------------------------------------------------------


def comparisons(**second) -> dict[str, Comparison]:
    def variant(label, **changes):
        return Variant(label, predicting=FEW_STEPS, **changes)

    losses = (variant("with"), variant("without", both={"loss.caption_weight": 0.0, **second}))
    stages = (variant("two"), variant("alone", stage2={"model.mapper.stage2_trains": "whole"}, has_stage1=False))
    return {
        "losses": Comparison("losses", "Losses", CAPTIONS, ("shape_and_colour",), losses),
        "stages": Comparison("stages", "Stages", STORIES, ("all_attributes", "modality"), stages),
    }


def written(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


@pytest.mark.slow
def test_a_second_call_does_nothing_and_a_change_redoes_its_cell_alone(tmp_path, capsys):
    def run(**second):
        return run_experiments(tmp_path, (), sizes=TINY, command="the command", comparisons=comparisons(**second))

    assert run() == 0
    cells, checkpoints = written(tmp_path, "cells/*/*.json"), written(tmp_path, "checkpoints/*")
    assert set(cells) == {"with-seed0.json", "without-seed0.json", "two-seed0.json", "alone-seed0.json"}
    assert len(checkpoints) == 4  # "two" starts from the one of "with"
    report = (tmp_path / "results.md").read_text()
    assert "the command" in report and "| two | " in report and "no result" not in report
    assert set(written(tmp_path, "figures/*")) == {"losses.png", "stages.png"}
    result = json.loads((tmp_path / "cells/losses/without-seed0.json").read_text())
    assert result["overrides"]["loss.caption_weight"] == 0.0
    assert result["measures"]["shape_and_colour"]["total"] == 2

    assert run() == 0
    assert "4 cells, 4 of them there already" in capsys.readouterr().err
    assert written(tmp_path, "cells/*/*.json") == cells
    assert written(tmp_path, "checkpoints/*") == checkpoints

    assert run_experiments(tmp_path, ["losses"], sizes=TINY, command="x", seeds=1, comparisons=comparisons()) == 0
    assert "## Stages" in (tmp_path / "results.md").read_text()  # an earlier call's

    assert run(**{"loss.text_weight": 0.5}) == 0
    again = written(tmp_path, "cells/*/*.json")
    assert {name for name in cells if again[name] != cells[name]} == {"without-seed0.json"}
    assert len(written(tmp_path, "checkpoints/*")) == len(checkpoints) + 1
    assert not list((tmp_path / "training").iterdir())


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_the_others_are_done(tmp_path, capsys):
    wrong = comparisons(**{"model.mapper.num_heads": 5})
    assert run_experiments(tmp_path, ["losses"], sizes=TINY, command="x", comparisons=wrong) == 1
    shown = capsys.readouterr().err
    assert "no result: losses / without / seed 0: InputError: model.mapper.num_heads: 5 does not divide" in shown
    report = (tmp_path / "results.md").read_text()
    assert "**1 cells have no result:**" in report and "| without | – | 0 |" in report
    assert set(written(tmp_path, "cells/*/*.json")) == {"with-seed0.json"}


def test_two_programs_do_not_work_in_one_folder(tmp_path):
    with alone_in(tmp_path), pytest.raises(InputError, match=r"--out .*: experiments are running there"):
        run_experiments(tmp_path, (), sizes=TINY, command="x", comparisons={})
    assert run_experiments(tmp_path, (), sizes=TINY, command="x", comparisons={}) == 0


def test_seeds_that_an_earlier_call_measured_stay_in_the_table(plan, capsys):
    comparison = Comparison("x", "X", CAPTIONS, ("shape_and_colour",), (Variant("one"),))
    for cell in plan.cells(comparison, 5):
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        share = {"right": 1, "total": 2, "value": 0.5}
        cell.path.write_text(json.dumps({"key": cell.prediction.key, "measures": {"shape_and_colour": share}}))
    assert run_experiments(plan.folder, (), sizes=TINY, command="x", seeds=1, comparisons={"x": comparison}) == 0
    assert "| one | 50.0 ± 0.0 | 5 |" in (plan.folder / "results.md").read_text()


def test_table_and_plot_of_several_seeds(plan, tmp_path):
    comparison = COMPARISONS["guidance"]
    cells = plan.cells(comparison, 3)
    for cell in cells[:-3]:
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        share = {"right": 1, "total": 4, "value": 0.25 + 0.1 * cell.seed}
        result = {"key": cell.prediction.key, "measures": {"shape_and_colour": share}}
        cell.path.write_text(json.dumps(result))
    found = collect(cells)
    lines = table(comparison, found)
    assert lines[2] == "| trained with it, scale 1 | 35.0 ± 24.8 | – | 3 |"
    assert lines[-1] == "| trained without, scale 7.5 | – | – | 0 |"
    assert counted(comparison, cells) == "4 (wanted thing: shape and colour)"
    draw(comparison, found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_one_seed_is_not_drawn_as_three_that_agree(tmp_path):
    comparison = COMPARISONS["min_snr"]
    for half in (None, 0.0):
        found = {variant.label: {"shape_and_colour": Interval(0.5, half, 1)} for variant in comparison.variants}
        draw(comparison, found, tmp_path / f"{half}.png")
    assert (tmp_path / "None.png").read_bytes() != (tmp_path / "0.0.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs 0"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "1", "2", "3"], "one or two numbers"),
    ],
)
def test_numbers_that_cannot_be_used_are_named(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        main(["experiments", "--out", str(tmp_path), *arguments])


def test_help_imports_nothing_heavy():
    code = "import sys, minigpt5.tinyworld.__main__ as m; m.build_parser(); sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT).returncode == 0
