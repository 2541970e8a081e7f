"""The playground and the API example run from their own folder with the tiny preset's bundled checkpoints."""

import os
import runpy
import subprocess
import sys
import time
from threading import Event

import pytest
from PIL import Image

from minigpt5.config import PROJECT_ROOT

EXAMPLES = PROJECT_ROOT / "examples"
QUICK = ["--set", "generation.max_new_tokens=6", "--set", "generation.num_inference_steps=2"]
BUNDLED = ["--stage1_weight", "stage1_cc3m.ckpt", "--test_weight", "stage2_vist.ckpt"]


def run(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.endswith("FOLDER")}
    environment = {**kept, "MINIGPT5_CONFIG": "config/tiny.yaml", "IS_STAGE2": "True", **variables}
    return subprocess.run([sys.executable, *argv], cwd=EXAMPLES, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_playground_writes_a_picture_a_reply(tmp_path):
    done = run("playground.py", *BUNDLED, *QUICK, "--force_image", "--replies", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "notice: --test_weight: not in" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test_0.png", "test_1.png"]
    assert Image.open(tmp_path / "test_0.png").size == (64, 64)


@pytest.mark.slow
def test_playground_says_nothing_of_bundled_checkpoints_that_were_asked_for(tmp_path):
    shipped = PROJECT_ROOT / "minigpt5" / "tinyworld" / "weights" / "checkpoints"
    weights = [str(shipped / name) if name.endswith(".ckpt") else name for name in BUNDLED]
    done = run("playground.py", *weights, *QUICK, "--force_image", "--replies", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "notice: --test_weight" not in done.stderr and "notice: --stage1_weight" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--test_weight: give the checkpoint"),
        ([*BUNDLED, "--prompt", "look <ImageHere>"], "--prompt: the text holds 1 <ImageHere> but 0 pictures"),
        ([*BUNDLED, "--prompt", "look", "--images", "nowhere.jpg"], "--images nowhere.jpg: no such file"),
        ([*BUNDLED, "--images", "story_0.png"], "--images: needs --prompt"),
        ([*BUNDLED, "--promt", "look"], "unknown flag --promt"),
        ([*BUNDLED, "--replies", "0"], "--replies 0: give at least 1"),
        ([*BUNDLED, "--out", "story_0.png"], "--out story_0.png: cannot be made a folder"),
        # an empty question is one, with a picture that is looked at
        ([*BUNDLED, "--prompt", "", "--images", "playground.py"], "playground.py: not a readable picture"),
    ],
)
def test_playground_refuses_what_it_cannot_use(argv, words):
    done = run("playground.py", *argv)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_api_example_asks_twice():
    done = run("api_example.py")
    assert done.returncode == 0, done.stderr
    assert "first:" in done.stdout
    assert "second:" in done.stdout
    assert "(64, 64)" in done.stdout


def test_demo_refuses_a_file_for_a_folder(tmp_path):
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        done = run("demo.py", "--out", str(tmp_path / out))
        assert done.returncode != 0
        assert done.stderr.startswith(f"error: --out {tmp_path / out}: cannot be made a folder")
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("cores", "alone", "beside"), [(1, "1", "1"), (2, "2", "1"), (6, "4", "3"), (64, "4", "4")]
)
def test_demo_jobs_beside_each_other_share_the_cores(tmp_path, monkeypatch, cores, alone, beside):
    demo = runpy.run_path(str(EXAMPLES / "demo.py"))
    calls = []
    names = demo["run_jobs"].__globals__
    monkeypatch.setitem(names, "run", lambda *call: calls.append(call[1]["OMP_NUM_THREADS"]))
    monkeypatch.setitem(names, "cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    demo["run_jobs"](tmp_path, "config/tiny.yaml")
    assert calls == [alone, *[beside] * 6, alone, alone]


def test_demo_begins_nothing_once_a_job_has_failed(tmp_path, monkeypatch, capsys):
    demo = runpy.run_path(str(EXAMPLES / "demo.py"))
    names, begun, failed, calls = demo["run_jobs"].__globals__, Event(), Event(), []

    def run_command(arguments, variables, log=None):
        calls.append(arguments)
        if "VIST" in variables["DATAFOLDER"]:
            assert begun.wait(10)
            failed.set()
            raise subprocess.CalledProcessError(2, ["python", "train_eval.py"])
        if "MMDialog" in variables["DATAFOLDER"]:
            begun.set()
            assert failed.wait(10)
            time.sleep(0.5)

    monkeypatch.setitem(names, "run", run_command)
    with pytest.raises(subprocess.CalledProcessError):
        demo["run_jobs"](tmp_path, "config/tiny.yaml")
    assert ["--is_training" in call for call in calls] == [True] * 3
    assert "error: train_eval.py: ended with 2; what runs beside it ends first" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "GOMP_SPINCOUNT"])
def test_demo_keeps_what_the_user_says_of_threads(monkeypatch, name):
    share = runpy.run_path(str(EXAMPLES / "demo.py"))["core_share"]
    for variable in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(variable, raising=False)
    assert share(1).keys() == {"OMP_NUM_THREADS", "GOMP_SPINCOUNT"}
    monkeypatch.setenv(name, "3")
    assert share(1).keys() == {"OMP_NUM_THREADS", "GOMP_SPINCOUNT"} - {name}


def test_demo_finds_its_configuration_before_it_writes(tmp_path, monkeypatch):
    find = runpy.run_path(str(EXAMPLES / "demo.py"))["find_config"]
    monkeypatch.chdir(tmp_path)
    assert find("config/tiny.yaml") == "config/tiny.yaml"
    (tmp_path / "my.yaml").touch()
    assert find("my.yaml") == str(tmp_path / "my.yaml")
    done = run("demo.py", "--out", str(tmp_path / "out"), "--config", "absent.yaml")
    assert done.returncode != 0
    assert done.stderr.startswith("error: --config absent.yaml: no such file")
    assert not (tmp_path / "out").exists()


def test_demo_does_not_follow_what_other_runs_were_told(monkeypatch):
    run_command = runpy.run_path(str(EXAMPLES / "demo.py"))["run"]
    monkeypatch.setenv("OUTPUT_SUFFIX", "_mine")
    monkeypatch.setenv("KEPT", "yes")
    code = "import os, sys; sys.exit('OUTPUT_SUFFIX' in os.environ or os.environ['KEPT'] != 'yes')"
    run_command(["-c", code], {})
