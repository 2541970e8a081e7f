"""The published command lines, end to end on tiny data, and what they say to input they cannot use."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import metric
import train_eval
from minigpt4.errors import InputError
from minigpt5.checkpoint import trainable_state
from minigpt5.cli import run_command
from minigpt5.config import PROJECT_ROOT, load_config
from minigpt5.data.types import Prompt
from minigpt5.hardware import choose_hardware
from minigpt5.predictions import read_predictions
from minigpt5.runs import load_model, open_model
from tests.integration.conftest import QUICK, TINY

SETTINGS = [word for key, value in QUICK.items() for word in ("--set", f"{key}={json.dumps(value)}")]
TRAIN = ["--is_training", "True", "--gpus", "0", *SETTINGS]
CC3M_FILES = ["--train_data_path", "cc3m_train.tsv", "--val_data_path", "cc3m_val.tsv"]
VIST_FILES = ["--train_data_path", "train_cleaned.json", "--val_data_path", "val_cleaned.json"]
STAGE2_TEST = ["--stage1_weight", "stage1_cc3m.ckpt", "--test_weight", "stage2_vist.ckpt"]


class Shell:
    """Published environment variables and commands."""

    def __init__(self, monkeypatch, folder, data) -> None:
        self.monkeypatch, self.folder, self.data = monkeypatch, folder, data
        self.weights, self.outputs = folder / "weights", folder / "outputs"
        monkeypatch.setenv("MINIGPT5_CONFIG", str(TINY))
        monkeypatch.setenv("WEIGHTFOLDER", str(self.weights))
        monkeypatch.setenv("OUTPUT_FOLDER", str(self.outputs))
        self.use(stage2=False, dataset="CC3M")

    def use(self, *, stage2: bool, dataset: str) -> None:
        self.monkeypatch.setenv("IS_STAGE2", str(stage2))
        self.monkeypatch.setenv("DATAFOLDER", str(self.data / dataset))

    def train_eval(self, *argv: str) -> int:
        return run_command(train_eval.main, argv)

    def metric(self, *argv: str) -> int:
        return run_command(metric.main, argv)


@pytest.fixture
def shell(clean_environment, tmp_path, tiny_data):
    return Shell(clean_environment, tmp_path, tiny_data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data):
    """A weights folder with one checkpoint of each stage, made by the published training commands."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shell = Shell(monkeypatch, tmp_path_factory.mktemp("trained"), tiny_data)
        once = [*TRAIN, "--num_train_epochs", "1"]
        assert shell.train_eval(*once, *CC3M_FILES, "--model_save_name", "stage1_cc3m_{epoch}-{step}") == 0
        shell.use(stage2=True, dataset="VIST")
        names = ["--model_save_name", "stage2_vist_{epoch}-{step}", "--stage1_weight", "stage1_cc3m.ckpt"]
        assert shell.train_eval(*once, *VIST_FILES, *names) == 0
        return shell.weights


@pytest.fixture
def trained_shell(shell, trained):
    shutil.copytree(trained, shell.weights)
    return shell


@pytest.mark.slow
def test_stage_1_predicts_and_scores(trained_shell):
    shell = trained_shell
    test = ["--test_data_path", "cc3m_val.tsv", "--test_weight", "stage1_cc3m.ckpt", *SETTINGS]
    assert shell.train_eval(*test, "--force_image") == 0
    folder = shell.outputs / "stage1_cc3m"
    predictions = read_predictions(folder)
    assert [prediction.id for prediction in predictions] == ["cc3m_0", "cc3m_1", "cc3m_2", "cc3m_3"]
    for prediction in predictions:
        assert prediction.dataset == "cc3m"
        assert prediction.target == prediction.caption
        assert "[IMG0]" in prediction.text
        files = [*prediction.images, *prediction.target_images, prediction.baseline_image]
        assert len(prediction.target_images) == 1
        assert all((folder / name).is_file() for name in files)
    assert shell.metric("--test_weight", "stage1_cc3m.ckpt") == 0
    assert "overall_fid_score" in json.loads((folder / "results_dict.json").read_text())
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_stage_2_predicts_the_same_in_any_batch_and_after_a_kill(trained_shell):
    shell = trained_shell
    shell.use(stage2=True, dataset="VIST")
    test = ["--test_data_path", "val_cleaned.json", *STAGE2_TEST, *SETTINGS, "--force_image"]
    assert shell.train_eval(*test, "--batch_size", "1") == 0
    folder = shell.outputs / "stage2_vist"
    whole = read_predictions(folder)
    assert whole
    assert {prediction.dataset for prediction in whole} == {"vist"}
    # the step's sentence is not in the response, but the picture is scored against it
    assert all(prediction.description and prediction.description in prediction.prompt for prediction in whole)

    # A kill leaves whole lines and perhaps a torn one; the run goes on behind them.
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    assert shell.train_eval(*test, "--batch_size", "3") == 0
    assert read_predictions(folder) == whole
    assert shell.metric("--test_weight", "stage2_vist.ckpt") == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["scores"]["clip_text_similarity"]["count"] == len(whole)


@pytest.mark.slow
def test_processes_share_the_test_set(trained_shell):
    shell = trained_shell
    test = ["--test_data_path", "cc3m_val.tsv", "--test_weight", "stage1_cc3m.ckpt", *SETTINGS]
    assert shell.train_eval(*test) == 0
    alone = {prediction.id: prediction for prediction in read_predictions(shell.outputs / "stage1_cc3m")}
    shell.monkeypatch.setenv("OUTPUT_SUFFIX", "_shared")
    for rank in ("0", "1"):
        shell.monkeypatch.setenv("RANK", rank)
        shell.monkeypatch.setenv("WORLD_SIZE", "2")
        assert shell.train_eval(*test) == 0
    folder = shell.outputs / "stage1_cc3m_shared"
    assert len((folder / "predictions.rank1.jsonl").read_text().splitlines()) == 2
    assert {prediction.id: prediction for prediction in read_predictions(folder)} == alone


@pytest.mark.slow
def test_predictions_of_another_checkpoint_are_refused(trained_shell, capsys):
    shell = trained_shell
    test = ["--test_data_path", "cc3m_val.tsv", "--test_weight", "stage1_cc3m.ckpt", *SETTINGS]
    assert shell.train_eval(*test) == 0
    path = shell.weights / "stage1_cc3m.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["rows.head"] += 1
    torch.save(content, path)
    assert shell.train_eval(*test) == 2
    assert "OUTPUT_SUFFIX" in error_of(capsys)


# ---- input that cannot be used -----------------------------------------------------------------------------


def error_of(capsys) -> str:
    """Return what was printed from ``error:`` on; there is no traceback."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.count("error: ") == 1
    return printed[printed.index("error: ") :]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def garbage_checkpoint(shell):
    write(shell.weights / "stage1_cc3m.ckpt", "not a checkpoint")


def pickled_checkpoint(shell):
    shell.weights.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": shutil.rmtree}, shell.weights / "stage1_cc3m.ckpt")


def foreign_checkpoint(shell):
    shell.weights.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"conv.weight": torch.zeros(2)}}, shell.weights / "stage1_cc3m.ckpt")


def own_data(shell, name, text):
    shell.monkeypatch.setenv("DATAFOLDER", str(shell.folder / "data"))
    write(shell.folder / "data" / name, text)


def unreadable_pictures(shell):
    own_data(shell, "cc3m_val.tsv", "caption\timage_path\na red star\tval/0.jpg\n")
    write(shell.folder / "data" / "val" / "0.jpg", "not a picture")


def broken_yaml(text):
    def prepare(shell):
        write(shell.folder / "broken.yaml", text)
        shell.monkeypatch.setenv("MINIGPT5_CONFIG", str(shell.folder / "broken.yaml"))

    return prepare


def nothing(shell):
    """The input is bad by its flags alone."""


TEST_1 = ["--test_data_path", "cc3m_val.tsv", "--test_weight", "stage1_cc3m.ckpt", *SETTINGS]
TRAIN_1 = [*TRAIN, *CC3M_FILES]
BAD_INPUT = {
    "no flags": ([], nothing, ["--is_training", "--test_weight"]),
    "unknown flag": (["--test_wieght", "x"], nothing, ["--test_wieght", "did you mean --test_weight?"]),
    "bad value": (["--num_workers", "many"], nothing, ["--num_workers", "many"]),
    "value out of range": (["--real_batch_size", "0"], nothing, ["--real_batch_size"]),
    "unknown YAML key": (TRAIN_1, broken_yaml("training: {lr: 1}"), ["broken.yaml", "training.lr", "unknown key"]),
    "malformed YAML": (TRAIN_1, broken_yaml("training: [1"), ["broken.yaml", "not valid YAML"]),
    "no such configuration": (["--config", "absent.yaml"], nothing, ["--config absent.yaml"]),
    "unknown strategy": ([*TRAIN_1, "--strategy", "foo"], nothing, ["--strategy foo"]),
    "unwritable folder": ([*TRAIN_1, "--output_dir", "/proc/nope"], nothing, ["/proc/nope", "cannot be written"]),
    "heads that do not divide": (
        [*TRAIN_1, "--set", "model.mapper.num_heads=5"], nothing, ["model.mapper.num_heads: 5 does not divide"],
    ),
    "interval out of range": (
        [*TRAIN_1, "--set", "training.val_check_interval=-3"], nothing, ["training.val_check_interval"],
    ),
    "missing checkpoint": (TEST_1, nothing, ["--test_weight stage1_cc3m.ckpt", "no such checkpoint"]),
    "garbage checkpoint": (TEST_1, garbage_checkpoint, ["stage1_cc3m.ckpt", "not a readable weight file"]),
    "checkpoint with code in it": (TEST_1, pickled_checkpoint, ["stage1_cc3m.ckpt", "not a readable"]),
    "another model's checkpoint": (TEST_1, foreign_checkpoint, ["stage1_cc3m.ckpt", "conv.weight"]),
    "missing model weights": (
        [*TRAIN_1, "--set", "model.diffusion.weights=/absent/sd"], nothing,
        ["model.diffusion.weights", "/absent/sd"],
    ),
    "wrong kind of model weights": (
        [*TRAIN_1, "--set", "model.backbone.projection_weights={vision}"], nothing, ["{vision}", "projection"],
    ),
    "stage 2 without stage 1": ([*TRAIN_1, "--stage", "multimodal"], nothing, ["--stage1_weight"]),
    "no data path": ([*TRAIN, *CC3M_FILES[:2]], nothing, ["--val_data_path"]),
    "missing data file": (
        [*TRAIN, *CC3M_FILES[:2], "--val_data_path", "absent.tsv"], nothing, ["--val_data_path", "absent.tsv"],
    ),
    "missing column": (
        TRAIN_1, lambda shell: (own_data(shell, "cc3m_val.tsv", "caption\turl\n"),
                                own_data(shell, "cc3m_train.tsv", "caption\turl\na\tb\n")),
        ["cc3m_train.tsv", "image_path"],
    ),
    "malformed JSON": (
        [*TRAIN, "--train_data_path", "a_cleaned.json", "--val_data_path", "a_cleaned.json"],
        lambda shell: own_data(shell, "a_cleaned.json", '{"1": [}'), ["a_cleaned.json"],
    ),
    "malformed conversation line": (
        [*TRAIN, "--train_data_path", "a.txt", "--val_data_path", "a.txt"],
        lambda shell: own_data(shell, "a.txt", '{"conversation_id": 1, "conversation": [\n'), ["a.txt"],
    ),
    "no readable picture": (
        [*TRAIN, "--train_data_path", "cc3m_val.tsv", "--val_data_path", "cc3m_val.tsv"],
        unreadable_pictures, ["cc3m_val.tsv", "0.jpg"],
    ),
    "unknown layout": (
        [*TRAIN, "--train_data_path", "a.csv", "--val_data_path", "a.csv"],
        lambda shell: own_data(shell, "a.csv", "a,b\n1,2\n"), ["a.csv", "cc3m", "vist", "mmdialog"],
    ),
    "resume from nothing": ([*TRAIN_1, "--resume", "absent.ckpt"], nothing, ["--resume absent.ckpt"]),
    "absent logger": ([*TRAIN[:4], *CC3M_FILES, "--loggers", "cvs"], nothing, ["--loggers", "csv"]),
}  # fmt: skip


@pytest.mark.parametrize(("argv", "prepare", "words"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_gives_one_error_and_exit_code_2(shell, capsys, argv, prepare, words):
    prepare(shell)
    vision = str(vision_weights())
    argv = [word.replace("{vision}", vision) for word in argv]
    assert shell.train_eval(*argv) == 2
    message = error_of(capsys)
    absent = [word for word in words if word.replace("{vision}", vision) not in message]
    assert not absent, message


def vision_weights():
    return load_config(TINY, {}, {}).model.backbone.vision.weights


def test_several_problems_are_one_error(shell, capsys):
    shell.use(stage2=True, dataset="VIST")
    assert shell.train_eval("--test_data_path", "absent.json", "--test_weight", "absent.ckpt") == 2
    message = error_of(capsys)
    assert all(flag in message for flag in ("--stage1_weight", "--test_weight", "--test_data_path"))
    assert message.startswith("error: 3 problems")


@pytest.mark.slow
def test_checkpoints_of_the_wrong_stage_or_kind(trained_shell, capsys):
    shell = trained_shell
    assert shell.train_eval(*TEST_1[:2], "--test_weight", "stage2_vist.ckpt", *SETTINGS) == 2
    assert "stage-2" in error_of(capsys)
    shell.use(stage2=True, dataset="VIST")
    swapped = ["--stage1_weight", "stage2_vist.ckpt", "--test_weight", "stage1_cc3m.ckpt"]
    assert shell.train_eval("--test_data_path", "val_cleaned.json", *swapped, *SETTINGS) == 2
    assert "--stage1_weight" in error_of(capsys)
    resume = ["--stage1_weight", "stage1_cc3m.ckpt", "--resume", "stage1_cc3m-last.ckpt"]
    assert shell.train_eval(*TRAIN, *VIST_FILES, *resume) == 2
    assert "belongs to stage alignment" in error_of(capsys)
    content = torch.load(shell.weights / "stage2_vist.ckpt", weights_only=True)
    torch.save({key: content[key] for key in ("state_dict", "minigpt5")}, shell.weights / "weights_only.ckpt")
    assert shell.train_eval(*TRAIN, *VIST_FILES, *resume[:2], "--resume", "weights_only.ckpt") == 2
    assert "no training state" in error_of(capsys)


def test_a_traceback_on_request(shell):
    with pytest.raises(ValueError, match="absent.yaml"):
        shell.train_eval("--config", "absent.yaml", "--debug")


def test_exit_code_of_a_real_process():
    command = [sys.executable, "train_eval.py", "--wrong"]
    finished = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: unknown flag --wrong")
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--test_weight", "absent.ckpt"], ["absent"]),
        (["--test_weight", "torn.ckpt", "--confg", "x"], ["--confg"]),
        (["--test_weight", "torn.ckpt"], ["torn", "predictions.jsonl:1"]),
    ],
)
def test_bad_input_of_metric(shell, capsys, argv, words):
    write(shell.outputs / "torn" / "predictions.jsonl", "{}\n")
    try:
        code = shell.metric(*argv)
    except SystemExit as exit_:  # argparse's own way out
        code = exit_.code
    assert code == 2
    message = error_of(capsys)
    assert all(word in message for word in words), message


def test_opened_model_generates(trained, quick_config):
    weights = {"stage1_weight": "stage1_cc3m.ckpt", "test_weight": "stage2_vist.ckpt", "paths__weights": trained}
    config = quick_config("VIST", stage="multimodal", generation__images="force", **weights)
    model = open_model(config)
    assert not model.training
    (reply,) = model.generate([Prompt("a", "###Human: a red star ###Assistant:")], config.generation)
    assert len(reply.images) >= 1
    with pytest.raises(InputError, match="2 problems"):
        open_model(quick_config("VIST", stage="multimodal"))


def test_trainable_state_is_what_a_checkpoint_holds(trained, quick_config):
    config = quick_config("VIST", stage="multimodal", stage1_weight=trained / "stage1_cc3m.ckpt", is_training=True)
    model = load_model(config, choose_hardware(config.training))
    content = torch.load(trained / "stage2_vist.ckpt", weights_only=True)
    assert content["state_dict"].keys() == trainable_state(model).keys()
    assert any("lora_B" in key and value.abs().max() > 0 for key, value in content["state_dict"].items())
