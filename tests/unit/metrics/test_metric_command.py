import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from tests.unit.metrics.small_store import StoreBuilder, picture

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(tmp_path, networks) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"metrics": asdict(networks)}), encoding="utf-8")
    return path


def _run(*arguments: str, environment: dict[str, str] | None = None, folder: Path = ROOT):
    command = [sys.executable, str(ROOT / "metric.py"), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": "", "HOME": str(folder)} | (environment or {}),
    )


def _store(folder: Path, dataset: str = "mmdialog", sample_id: str = "0_1") -> StoreBuilder:
    store = StoreBuilder(folder, dataset)
    store.add(sample_id, [picture(1)], [picture(2)], None, "a dog [IMG0] ###", "a cat [IMG0][IMG1] ###")
    return store


def test_published_command_scores_the_run_of_a_checkpoint(tmp_path, config):
    # The published program would take CC3M from DATAFOLDER; the data set is the predictions' own.
    folder = tmp_path / "out" / "stage2_a.v1_b"
    _store(folder)
    environment = {
        "MINIGPT5_CONFIG": str(config),
        "OUTPUT_FOLDER": str(tmp_path / "out"),
        "OUTPUT_SUFFIX": "_b",
        "DATAFOLDER": "datasets/CC3M",
    }
    done = _run("--test_weight", "stage2_a.v1.ckpt", environment=environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(folder / "report.html") in done.stdout
    assert "overall_clip_f1" in json.loads((folder / "results_dict.json").read_text(encoding="utf-8"))


def test_predictions_folder_and_data_set_can_be_given(tmp_path, config):
    _store(tmp_path / "run", "cc3m", "cc3m_0")
    flags = ("--predictions", str(tmp_path / "run"), "--dataset", "cc3m", "--config", str(config))
    done = _run(*flags, environment={"CC3M_FOLDER": str(tmp_path / "nothing")})
    assert done.returncode == 0, done.stderr
    assert "set CC3M_FOLDER" in done.stderr


def test_real_pictures_are_looked_for_where_the_data_are(tmp_path, config):
    _store(tmp_path / "run", "cc3m", "cc3m_0")
    flags = ("--predictions", str(tmp_path / "run"), "--dataset", "cc3m", "--config", str(config))
    done = _run(*flags, environment={"DATAFOLDER": str(tmp_path / "elsewhere")})
    assert f"No FID: {tmp_path / 'elsewhere'} holds no val/*/*.jpg" in done.stderr
    for number in range(3):
        path = tmp_path / "elsewhere" / "val" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    done = _run(*flags, environment={"DATAFOLDER": str(tmp_path / "elsewhere")})
    assert f"FID against 3 pictures of {tmp_path / 'elsewhere'} (CC3M_FOLDER), fewer than" in done.stderr


def test_help_is_light():
    done = _run("--help")
    assert done.returncode == 0
    light = "import sys, metric, minigpt5.cli; print('torch' in sys.modules)"
    probe = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, cwd=ROOT)
    assert probe.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--test_weight", "nobody.ckpt"], "no predictions there"),
        (["--nonsense"], "unknown flag --nonsense"),
        ([], "give --test_weight"),
        (["--test_weigth", "a.ckpt"], "did you mean --test_weight?"),
        (["--predictions", "x", "--dataset", "coco"], "invalid choice"),
    ],
)
def test_bad_input_exits_2_without_a_traceback(tmp_path, config, arguments, message):
    environment = {"OUTPUT_FOLDER": str(tmp_path), "MINIGPT5_CONFIG": str(config)}
    done = _run(*arguments, environment=environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_mixed_data_sets_need_a_choice(tmp_path, config):
    store = _store(tmp_path / "run", "vist", "a_0")
    store.dataset = "cc3m"
    store.add("cc3m_1", [picture(1)], [picture(2)])
    done = _run("--predictions", str(tmp_path / "run"), "--config", str(config))
    assert done.returncode == 2
    assert "cc3m, vist" in done.stderr
    assert "--dataset" in done.stderr
