"""Configuration: precedence, paths, and one clear error for everything wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.errors import InputError
from minigpt5.config import PROJECT_ROOT, RunConfig, Stage, load_config, validate_config


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_papers_values_are_the_defaults():
    config = RunConfig()
    training, generation, loss = config.training, config.generation, config.loss
    assert (training.num_epochs, training.batch_size, training.effective_batch_size) == (2, 2, 48)
    assert (training.learning_rate, training.adam_epsilon, training.warmup_steps) == (2e-5, 1e-8, 1000)
    assert (training.seed, training.mapper_learning_rate_factor) == (42, 10)
    assert (loss.text_weight, loss.image_weight, loss.caption_weight) == (0.01, 1.0, 0.1)
    assert (loss.min_snr_gamma, loss.condition_dropout) == (5.0, 0.1)
    assert (generation.top_p, generation.temperature, generation.repetition_penalty) == (0.9, 1.0, 2.0)
    assert (generation.max_new_tokens, generation.num_inference_steps) == (256, 50)
    assert generation.guidance_scale == 7.5
    adapter = config.model.adapter
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (8, 16, 0.05)
    assert adapter.target_modules == ("q_proj", "v_proj")


def test_flags_win_over_environment_over_file_over_defaults(tmp_path):
    path = write(tmp_path / "a.yaml", "data: {folder: from_file}\npaths: {weights: from_file}\n")
    environment = {"DATAFOLDER": "from_environment", "OUTPUT_FOLDER": "out"}
    config = load_config(path, {"data.folder": "from_flag"}, environment)
    assert config.data.folder == Path("from_flag")
    assert config.paths.outputs == Path("out")
    assert config.paths.weights == Path("from_file")
    assert load_config(path, {}, environment).data.folder == Path("from_environment")
    assert load_config(path, {}, {}).data.folder == Path("from_file")


@pytest.mark.parametrize(
    ("value", "stage"),
    [
        *[(value, Stage.MULTIMODAL) for value in ("True", "true")],
        *[(value, Stage.ALIGNMENT) for value in ("False", "false", "0", "")],
    ],
)
def test_is_stage2_is_read_as_published(tmp_path, value, stage):
    path = write(tmp_path / "a.yaml", "stage: multimodal")
    assert load_config(path, {}, {"IS_STAGE2": value}).stage is stage


@pytest.mark.parametrize("value", ["maybe", "1", "TRUE", " True"])
def test_any_other_is_stage2_is_refused(tmp_path, value):
    path = write(tmp_path / "a.yaml", "")
    with pytest.raises(InputError, match=rf"IS_STAGE2={value}: True \(or true\) means stage 2, False"):
        load_config(path, {}, {"IS_STAGE2": value})
    assert load_config(path, {"stage": "alignment"}, {"IS_STAGE2": value}).stage is Stage.ALIGNMENT


def test_environment_names_the_configuration(tmp_path):
    path = write(tmp_path / "a.yaml", "training: {seed: 7}")
    assert load_config(None, {}, {"MINIGPT5_CONFIG": str(path)}).training.seed == 7


def test_configuration_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("config/tiny.yaml"), {}, {}).model.diffusion.image_size == 64


def test_base_files_and_relative_paths(tmp_path):
    folder = tmp_path / "sub"
    folder.mkdir()
    write(tmp_path / "base.yaml", "training: {seed: 1, num_epochs: 5}\npaths: {weights: ./w}\n")
    path = write(folder / "over.yaml", "base: ../base.yaml\ntraining: {seed: 2}\n")
    config = load_config(path, {}, {})
    assert (config.training.seed, config.training.num_epochs) == (2, 5)
    assert config.paths.weights == tmp_path / "w"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainin: {}", "trainin: unknown key; known here: data, generation"),
        ("training: {sed: 1}", r"training\.sed: unknown key; known here: .*seed"),
        ("training: {seed: many}", r"training\.seed: .*integer.*'many'"),
        ("loss: {condition_dropout: 2}", r"loss\.condition_dropout: .*less than or equal to 1.*2"),
        ("data: {dataset: coco}", r"data\.dataset: .*cc3m"),
        ("a: [", "not valid YAML"),
        ("- a", "expected keys and values, found list"),
        ("base: ./nowhere.yaml", "base file .*nowhere.yaml does not exist"),
        ("base: ./a.yaml", "refers back to itself"),
    ],
)
def test_bad_files_are_named_with_their_key(tmp_path, text, message):
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(InputError, match=message) as error:
        load_config(path, {}, {})
    assert "a.yaml" in str(error.value)


def test_every_problem_is_listed_at_once():
    with pytest.raises(InputError) as error:
        validate_config({"training": {"seed": "x", "bach_size": 3}, "stage": "third"}, "flags")
    assert str(error.value).count("\n") == 3


def test_a_bad_value_is_told_of_what_set_it_and_not_of_the_file(tmp_path):
    path = write(tmp_path / "a.yaml", "training: {seed: 1}")
    with pytest.raises(InputError) as error:
        load_config(path, {"training.seed": "x", "foo.bar": 1, "loss": {"lr": 1}}, {}, {"training.seed": "--seed"})
    heading, *lines = str(error.value).splitlines()
    assert heading == "invalid configuration"
    assert sorted(line.partition(": ")[0] for line in lines) == [
        "  --seed (training.seed)",
        "  --set (foo.bar)",
        "  --set (loss)",
    ]


def test_a_bad_value_of_the_file_is_told_of_the_file(tmp_path):
    path = write(tmp_path / "a.yaml", "training: {lr: 1}")
    with pytest.raises(InputError) as error:
        load_config(path, {"training.seed": "x"}, {})
    heading, *lines = str(error.value).splitlines()
    assert heading == f"{path}: invalid configuration"
    assert sorted(line.partition(": ")[0] for line in lines) == ["  --set (training.seed)", "  training.lr"]


def test_a_gpu_stands_once(tmp_path):
    path = write(tmp_path / "a.yaml", "")
    with pytest.raises(InputError, match=r"--gpus \(training\.devices\): names a GPU twice, found \(0, 0\)"):
        load_config(path, {"training.devices": (0, 0)}, {}, {"training.devices": "--gpus"})


def test_a_bad_variable_is_named(tmp_path):
    path = write(tmp_path / "a.yaml", "")
    with pytest.raises(InputError, match=r"WEIGHTFOLDER \(paths\.weights\): "):
        load_config(path, {}, {"WEIGHTFOLDER": object()})  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"^MINIGPT5_CONFIG nowhere\.yaml: no such file"):
        load_config(None, {}, {"MINIGPT5_CONFIG": "nowhere.yaml"})


def test_missing_file_says_where_it_looked():
    with pytest.raises(InputError, match=r"--config nowhere\.yaml: no such file \(looked in"):
        load_config(Path("nowhere.yaml"), {}, {})


@pytest.mark.parametrize(
    "module",
    [
        "minigpt5.config",
        "minigpt5.arguments",
        "minigpt5.checkpoint_command",
        "minigpt5.data.types",
        "train_eval",
        "metric",
    ],
)
def test_light_modules_do_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT).returncode == 0
