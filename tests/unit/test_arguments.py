import re
import subprocess
import sys

import pytest

from minigpt4.errors import InputError
from minigpt5.arguments import FLAGS, build_parser, parse_arguments, resolve_config
from minigpt5.config import PROJECT_ROOT, RunConfig, Stage

PUBLISHED_FLAGS = [
    "model_type",
    "snr_loss",
    "model_save_name",
    "stage1_weight",
    "train_data_path",
    "val_data_path",
    "test_data_path",
    "cache_dir",
    "output_dir",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "real_batch_size",
    "save_total_limit",
    "learning_rate",
    "warmup_ratio",
    "warmup_steps",
    "adam_epsilon",
    "num_workers",
    "gpus",
    "resume",
    "is_training",
    "test_weight",
]


@pytest.fixture
def resolve(tmp_path):
    """Parse and resolve a command line over a file that sets one value."""
    file = tmp_path / "minimal.yaml"
    file.write_text("training:\n  learning_rate: 0.5\n")

    def resolve_line(*argv: str, environment: dict[str, str] | None = None) -> RunConfig:
        variables = {"MINIGPT5_CONFIG": str(file)} | (environment or {})
        return resolve_config(parse_arguments(list(argv)), variables)

    return resolve_line


def look_up(config: RunConfig, key: str):
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_every_published_flag_exists():
    assert set(PUBLISHED_FLAGS) <= {flag.name for flag in FLAGS}


def test_every_flag_sets_a_known_key():
    defaults = RunConfig()
    for flag in FLAGS:
        for key in flag.keys:
            look_up(defaults, key)


@pytest.mark.parametrize(
    ("argv", "key", "expected"),
    [
        (["--is_training", "True"], "is_training", True),
        (["--is_training", "False"], "is_training", False),
        (["--is_training"], "is_training", True),
        (["--gpus", "0"], "training.devices", (0,)),
        (["--gpus", "0,1,2"], "training.devices", (0, 1, 2)),
        (["--gpus", "0", "1", "2"], "training.devices", (0, 1, 2)),
        (["--snr_loss", "False"], "loss.min_snr_gamma", None),
        (["--snr_loss", "True"], "loss.min_snr_gamma", 5.0),
        (["--learning_rate", "2e-4"], "training.learning_rate", 2e-4),
        ([], "training.learning_rate", 0.5),
        (["--real_batch_size", "12"], "training.effective_batch_size", 12),
        (["--force_image"], "generation.images", "force"),
        (["--loggers", "csv,tensorboard"], "training.loggers", ("csv", "tensorboard")),
        (["--loggers", "none"], "training.loggers", ()),
        (["--set", "data.max_samples=7"], "data.max_samples", 7),
        (["--set", "training.learning_rate=1e-5"], "training.learning_rate", 1e-5),
        (["--set", "model.adapter.target_modules=[q_proj]"], "model.adapter.target_modules", ("q_proj",)),
        (["--seed", "3"], "training.seed", 3),
        (["--seed", "3"], "generation.seed", 3),
    ],
)
def test_flag_values(resolve, argv, key, expected):
    assert look_up(resolve(*argv), key) == expected


def test_published_commands_of_both_stages(resolve):
    files = ["--train_data_path", "cc3m_val.tsv", "--val_data_path", "cc3m_val.tsv", "--gpus", "0"]
    stage1 = resolve(
        "--is_training", "True", *files, "--model_save_name", "stage1_cc3m_{epoch}-{step}",
        environment={"IS_STAGE2": "False", "WEIGHTFOLDER": "W", "DATAFOLDER": "datasets/CC3M"},
    )  # fmt: skip
    assert stage1.stage is Stage.ALIGNMENT
    assert (str(stage1.paths.weights), str(stage1.data.folder)) == ("W", "datasets/CC3M")
    stage2 = resolve(
        "--test_data_path", "val_cleaned.json", "--test_weight", "stage2_vist.ckpt", "--stage1_weight",
        "stage1_cc3m.ckpt", "--gpus", "0", environment={"IS_STAGE2": "True", "OUTPUT_SUFFIX": "_b"},
    )  # fmt: skip
    assert stage2.stage is Stage.MULTIMODAL
    assert not stage2.is_training
    assert (str(stage2.test_weight), str(stage2.stage1_weight)) == ("stage2_vist.ckpt", "stage1_cc3m.ckpt")


def test_flags_win_over_environment_and_file(resolve):
    environment = {"IS_STAGE2": "True", "DATAFOLDER": "from_environment"}
    config = resolve("--stage", "alignment", "--set", "data.folder=from_flag", environment=environment)
    assert config.stage is Stage.ALIGNMENT
    assert str(config.data.folder) == "from_flag"


def test_output_dir_moves_only_what_training_writes(resolve):
    config = resolve("--output_dir", "elsewhere", environment={"WEIGHTFOLDER": "W"})
    assert (str(config.paths.weights), str(config.paths.checkpoints)) == ("W", "elsewhere")


def test_ineffective_flag_gives_a_notice():
    assert "warmup_steps" in parse_arguments(["--warmup_ratio", "0.03"]).notices[0]
    assert parse_arguments(["--warmup_steps", "3"]).notices == ()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num_train_epoch", "3"], ["--num_train_epoch:", "did you mean --num_train_epochs?"]),
        (["--trian_data_path=x"], ["--trian_data_path:", "--train_data_path"]),
        (["stray"], ["stray"]),
        (["--num_train_epochs", "two"], ["--num_train_epochs", "two"]),
        (["--gpus", "first"], ["--gpus", "first"]),
        (["--is_training", "perhaps"], ["--is_training", "perhaps"]),
        (["--model_type", "llama"], ["--model_type", "multimodal_encoder"]),
        (["--train_data_path"], ["--train_data_path"]),
        (["--set", "training.max_steps"], ["--set training.max_steps", "KEY=VALUE"]),
        (["--set", "data.max_samples=[1"], ["--set data.max_samples", "YAML"]),
    ],
)
def test_bad_flags_are_input_errors(argv, words):
    with pytest.raises(InputError) as error:
        parse_arguments(argv)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num_train_epochs", "0"], ["--num_train_epochs (training.num_epochs)", "greater than or equal to 1"]),
        (["--loggers", "cvs"], ["--loggers", "'tensorboard'"]),
        (["--set", "training.lr=1"], ["--set (training.lr)", "unknown key", "learning_rate"]),
        (["--config", "absent.yaml"], ["--config absent.yaml", "no such file"]),
    ],
)
def test_bad_values_name_flag_and_key(resolve, argv, words):
    with pytest.raises(InputError) as error:
        resolve(*argv)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_help_is_complete():
    finished = subprocess.run(
        [sys.executable, "train_eval.py", "--help"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    assert all(f"--{flag}" in finished.stdout for flag in PUBLISHED_FLAGS)


def test_parsing_imports_nothing_heavy():
    code = (
        "import sys, train_eval; print(sorted({'torch', 'transformers', 'pytorch_lightning'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert finished.stdout.strip() == "[]", finished.stderr


def test_every_flag_names_its_default():
    parser = build_parser()
    flags = {flag.name for flag in FLAGS if flag.keys}
    silent = [
        action.dest
        for action in parser._actions
        if action.dest in flags and "default" not in (action.help or "").lower()
    ]
    assert silent == []


def test_flags_take_the_defaults_they_name():
    named = {
        action.dest: re.search(r"\(default: (\S+)\)", action.help or "") for action in build_parser()._actions
    }
    defaults = {flag.name: named[flag.name][1] for flag in FLAGS if flag.bare is not None and named[flag.name]}
    assert defaults.keys() >= {"is_training", "snr_loss", "force_image"}
    for name, default in defaults.items():
        build_parser().parse_args([f"--{name}", default])
