"""Flags of ``train_eval.py``: the published ones with their published meaning, and ours beside them.

One table (:data:`FLAGS`) maps each flag to the configuration key it sets. Only flags that were given override
the configuration. This module imports nothing heavy, so ``--help`` is quick.
"""

import argparse
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from minigpt4.errors import InputError
from minigpt5.config import DatasetName, RunConfig, Stage, load_config

PUBLISHED_SNR_GAMMA = 5.0


@dataclass(frozen=True)
class Flag:
    """One flag and what it sets.

    ``keys`` are dotted configuration keys; none means the flag is accepted and changes nothing, which
    ``notice`` then tells the user.
    """

    name: str
    keys: tuple[str, ...]
    help: str
    parse: Callable[[str], Any] = str
    many: bool = False
    bare: Any = None
    """Value of the flag without an argument; None: it needs one."""
    choices: tuple[str, ...] | None = None
    translate: Callable[[Any], Any] | None = None
    notice: str | None = None
    metavar: str | None = None


@dataclass(frozen=True)
class Arguments:
    """A parsed command line.

    ``overrides`` maps configuration keys to values, ``sources`` the same keys to the flags they came from.
    """

    config: Path | None
    overrides: dict[str, Any]
    sources: dict[str, str]
    notices: tuple[str, ...]
    debug: bool
    plan: str | None = None
    """Value of ``--plan``, empty without one; None: run."""


def parse_bool(text: str) -> bool:
    """Read a truth value as ``HfArgumentParser`` does: yes/true/t/y/1 and their opposites, any case."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")


def parse_gpus(text: str) -> tuple[int, ...]:
    """Read ``0`` or ``0,1,2``."""
    try:
        indices = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        indices = ()
    if not indices or min(indices) < 0:
        raise argparse.ArgumentTypeError(f"expected GPU indices such as 0 or 0,1,2, found {text!r}")
    return indices


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name and name != "none")


def _flatten(groups: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(item for group in groups for item in group)


_PUBLISHED = (
    Flag("is_training", ("is_training",), "train (True) or generate for the test data", parse_bool, bare=True),
    Flag("train_data_path", ("data.train",), "training data file, below DATAFOLDER", metavar="FILE"),
    Flag("val_data_path", ("data.validation",), "validation data file, below DATAFOLDER", metavar="FILE"),
    Flag("test_data_path", ("data.test",), "test data file, below DATAFOLDER", metavar="FILE"),
    Flag("model_save_name", ("model_save_name",), "checkpoint name, e.g. 'stage1_cc3m_{epoch}-{step}'"),
    Flag("stage1_weight", ("stage1_weight",), "stage 1 checkpoint, below WEIGHTFOLDER", metavar="FILE"),
    Flag("test_weight", ("test_weight",), "checkpoint to generate with, below WEIGHTFOLDER", metavar="FILE"),
    Flag("resume", ("resume",), "checkpoint to continue the training from", metavar="FILE"),
    Flag(
        "gpus", ("training.devices",), "GPU indices: 0 or 0,1,2 or 0 1 2 (default: all)", parse_gpus, many=True,
        translate=_flatten, metavar="INDEX",
    ),
    Flag(
        "snr_loss", ("loss.min_snr_gamma",), "Min-SNR loss weighting with gamma 5 (default: True)", parse_bool,
        bare=True, translate=lambda on: PUBLISHED_SNR_GAMMA if on else None,
    ),
    Flag(
        "model_type", (), "only multimodal_encoder, the published model, exists", choices=("multimodal_encoder",)
    ),
    Flag("cache_dir", (), "accepted and unused, as in the published code", metavar="FOLDER"),
    Flag(
        "output_dir", ("paths.checkpoints",), "folder for new checkpoints and logs (default: WEIGHTFOLDER)",
        metavar="FOLDER",
    ),
    Flag("num_train_epochs", ("training.num_epochs",), "passes over the training data", int),
    Flag("per_device_train_batch_size", ("training.batch_size",), "training samples per device and step", int),
    Flag("per_device_eval_batch_size", ("training.eval_batch_size",), "validation samples per device", int),
    Flag(
        "real_batch_size", ("training.effective_batch_size",),
        "samples per optimizer step over all devices; gradients of as many batches as go into it accumulate", int,
    ),
    Flag("save_total_limit", ("training.save_total_limit",), "how many of the best checkpoints are kept", int),
    Flag("learning_rate", ("training.learning_rate",), "peak learning rate", float),
    Flag(
        "warmup_ratio", (), "accepted and unused, as in the published code: see --warmup_steps", float,
        notice="--warmup_ratio has no effect (nor has it in the published code); use --warmup_steps",
    ),
    Flag("warmup_steps", ("training.warmup_steps",), "optimizer steps of linear warm-up", int),
    Flag("adam_epsilon", ("training.adam_epsilon",), "AdamW's epsilon", float),
    Flag("num_workers", ("data.num_workers",), "data loading processes per device", int),
)  # fmt: skip

_OURS = (
    Flag("stage", ("stage",), "training stage; overrides IS_STAGE2", choices=tuple(Stage)),
    Flag("dataset", ("data.dataset",), "layout of the data files (default: detected)", choices=tuple(DatasetName)),
    Flag(
        "force_image", ("generation.images",), "every reply begins with a picture (default: False)", parse_bool,
        bare=True, translate=lambda on: "force" if on else "auto",
    ),
    Flag("batch_size", ("generation.batch_size",), "prompts answered at once when generating", int),
    Flag("max_steps", ("training.max_steps",), "stop training after this many optimizer steps", int),
    Flag("seed", ("training.seed", "generation.seed"), "seed of every random draw", int),
    Flag(
        "precision", ("training.precision",), "auto: bf16-mixed on a GPU, 32-true on a CPU",
        choices=("auto", "bf16-mixed", "16-mixed", "32-true"),
    ),
    Flag(
        "strategy", ("training.strategy",),
        "auto, ddp, fsdp, or another of PyTorch Lightning's (default: auto, which is ddp on several devices)",
    ),
    Flag("num_nodes", ("training.num_nodes",), "number of machines", int),
    Flag(
        "quantization", ("model.backbone.language_model.quantization",),
        "store the language model's layers in 8 or 4 bits (needs bitsandbytes)", choices=("none", "8bit", "4bit"),
    ),
    Flag(
        "offload", ("model.diffusion.offload",),
        "when generating, keep Stable Diffusion on the CPU while it does not run", parse_bool, bare=True,
    ),
    Flag(
        "gradient_checkpointing", ("training.gradient_checkpointing",),
        "recompute activations in the backward pass: less memory, more time", parse_bool, bare=True,
    ),
    Flag(
        "loggers", ("training.loggers",), "csv, tensorboard, wandb, or none", _parse_names, many=True,
        translate=_flatten, metavar="NAME",
    ),
)  # fmt: skip

FLAGS: tuple[Flag, ...] = _PUBLISHED + _OURS


class FlagParser(argparse.ArgumentParser):
    """A parser whose errors are the project's own, so that every command line reports them alike."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as an :class:`InputError`."""
        raise InputError(message)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``train_eval.py``."""
    parser = FlagParser(
        prog="train_eval.py",
        description="Train MiniGPT-5, or generate replies for a test set.",
        epilog=(
            "Environment: MINIGPT5_CONFIG, IS_STAGE2, DATAFOLDER, PREPROCESS_FEATURE_FOLDER, CC3M_FOLDER, "
            "WEIGHTFOLDER, OUTPUT_FOLDER, OUTPUT_SUFFIX. Flags win over the environment, which wins over the "
            "configuration file, whose values replace the defaults shown here."
        ),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    _add(parser.add_argument_group("published flags"), _PUBLISHED)
    ours = parser.add_argument_group("further flags")
    ours.add_argument("--config", type=Path, metavar="FILE", help="YAML file (default: the paper's model)")
    _add(ours, _OURS)
    ours.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="any configuration key, e.g. data.max_samples=100"
    )
    ours.add_argument(
        "--plan", nargs="?", const="", metavar="TOKENS,PICTURES",
        help="print how much memory the run needs on each device, load nothing and exit; optionally for samples "
        "of so many text tokens and input pictures",
    )  # fmt: skip
    ours.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse a command line (default: ``sys.argv``).

    Raises:
        InputError: an unknown flag (the closest known one is named) or a malformed value.
    """
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(unknown_flags(parser, unknown))
    values = vars(parsed)
    overrides: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for flag in FLAGS:
        if flag.name not in values:
            continue
        value = values[flag.name]
        value = flag.translate(value) if flag.translate else value
        for key in flag.keys:
            overrides[key] = value
            sources[key] = f"--{flag.name}"
    for assignment in values.get("set", ()):
        key, value = parse_assignment(assignment)
        overrides[key] = value
        sources[key] = "--set"
    notices = tuple(flag.notice for flag in FLAGS if flag.notice and flag.name in values)
    return Arguments(
        values.get("config"), overrides, sources, notices, values.get("debug", False), values.get("plan")
    )


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split ``KEY=VALUE`` of ``--set``; the value is read as YAML.

    Raises:
        InputError: no ``=``, an empty key or a value that is not YAML.
    """
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")):
        raise InputError(f"--set {text}: expected KEY=VALUE, e.g. --set training.max_steps=100")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {text}: the value is not valid YAML: {error}") from None


def resolve_config(arguments: Arguments, environment: Mapping[str, str]) -> Any:
    """Return the :class:`~minigpt5.config.RunConfig` of a parsed command line.

    Raises:
        InputError: as :func:`~minigpt5.config.load_config`; a key set by a flag is shown with that flag.
    """
    return load_config(arguments.config, arguments.overrides, environment, arguments.sources)


def _help_with_default(flag: Flag) -> str:
    """Return a flag's help with the default of the key it sets; the configuration file may set another."""
    if not flag.keys or "default:" in flag.help:
        return flag.help
    value: Any = RunConfig()
    for part in flag.keys[0].split("."):
        value = getattr(value, part)
    shown = "none" if value in (None, ()) else str(value)
    if value and isinstance(value, tuple):
        shown = " ".join(map(str, value))
    return f"{flag.help} (default: {shown})".replace("%", "%%")


def _add(group: argparse._ArgumentGroup, flags: Iterable[Flag]) -> None:
    for flag in flags:
        options: dict[str, Any] = {"type": flag.parse, "help": _help_with_default(flag)}
        if flag.bare is not None:
            options |= {"nargs": "?", "const": flag.bare, "metavar": "True|False"}
        elif flag.many:
            options |= {"nargs": "+", "metavar": flag.metavar}
        elif flag.choices:
            options["choices"] = [str(choice) for choice in flag.choices]
        else:
            options["metavar"] = flag.metavar or {int: "N", float: "X"}.get(flag.parse, "TEXT")  # type: ignore[call-overload]
        group.add_argument(f"--{flag.name}", **options)


def unknown_flags(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """Return what to say of arguments a parser does not know, with the closest flag it does."""
    known = [option for action in parser._actions for option in action.option_strings]
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if not flags:
        return f"unexpected argument {unknown[0]!r}; every value needs its flag before it (see --help)"
    problems = []
    for flag in flags:
        closest = difflib.get_close_matches(flag, known, n=1)
        hint = f"did you mean {closest[0]}?" if closest else "see --help"
        problems.append(f"unknown flag {flag}: {hint}")
    return "; ".join(problems)
