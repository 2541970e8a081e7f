"""YAML file + flags + the published environment variables → one validated :class:`RunConfig`.

Precedence, lowest first: defaults here (the paper's values), the YAML file and its ``base`` files, environment
variables, flags. Nothing is read at import: :func:`load_config` is called once, in ``main()``.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from minigpt4.config import BackboneConfig
from minigpt4.errors import InputError
from minigpt5.config_errors import explain_problems

PROJECT_ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = PROJECT_ROOT / "config" / "minigpt5_7b.yaml"

_STRICT = ConfigDict(extra="forbid", protected_namespaces=())


def _each_once(indices: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(indices)) < len(indices):
        raise PydanticCustomError("repeated", "names a GPU twice")
    return indices


class Stage(StrEnum):
    """The two training stages of the paper (sections 3.3.1 and 3.3.2)."""

    ALIGNMENT = "alignment"
    MULTIMODAL = "multimodal"


class DatasetName(StrEnum):
    """A data set whose published layout has a reader; ``auto`` detects it from the data file."""

    AUTO = "auto"
    CC3M = "cc3m"
    VIST = "vist"
    MMDIALOG = "mmdialog"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class VokenConfig:
    """Generative vokens (paper section 3.2)."""

    count: int = Field(default=8, ge=1, le=64)
    label_loss: Literal["first_and_last", "all"] = "first_and_last"
    """Vokens that carry language loss: the published code keeps only the first and the last."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MapperConfig:
    """Feature mapper from voken states to the diffusion model's conditioning (paper section 3.2)."""

    kind: Literal["transformer", "mlp"] = "transformer"
    """mlp: a linear map of the voken positions in place of the transformer and its queries; depth and heads then
    mean nothing."""
    encoder_layers: int = Field(default=4, ge=1)
    decoder_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=8, ge=1)
    feedforward_ratio: int = Field(default=4, ge=1)
    num_queries: int = Field(default=77, ge=1)
    stage2_trains: Literal["published", "whole"] = "published"
    """published: MLP and queries stay as stage 1 left them. whole: everything trains, so that stage 2 needs no
    stage 1 and its checkpoints hold the whole mapper."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AdapterConfig:
    """What adapts the language model in the multimodal stage (nothing does in the alignment stage)."""

    kind: Literal["lora", "prefix", "none"] = "lora"
    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    prefix_length: int = Field(default=16, ge=1)
    """Trained key-value pairs in front of every layer (``kind: prefix``); the other settings are LoRA's."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DiffusionConfig:
    """The frozen Stable Diffusion model."""

    weights: str | None = None
    """diffusers folder or hub id (``stabilityai/stable-diffusion-2-1-base``)."""
    architecture: dict[str, dict[str, Any]] | None = None
    """Component name (unet, vae, text_encoder, scheduler) → its config; needed only without weights."""
    image_size: int = Field(default=512, ge=8)
    """Side of training targets and generated pictures, in pixels."""
    offload: bool = False
    """Generation only: UNet, VAE and text encoder wait on the CPU and are on the GPU only while they run."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """Everything that decides which parameters exist."""

    backbone: BackboneConfig = BackboneConfig()
    vokens: VokenConfig = VokenConfig()
    mapper: MapperConfig = MapperConfig()
    adapter: AdapterConfig = AdapterConfig()
    diffusion: DiffusionConfig = DiffusionConfig()


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LossConfig:
    """Weights of the training loss (paper equations 5 to 7 and the published code)."""

    text_weight: float = Field(default=0.01, ge=0)
    image_weight: float = Field(default=1.0, ge=0)
    caption_weight: float = Field(default=0.1, ge=0)
    min_snr_gamma: float | None = Field(default=5.0, gt=0)
    """Min-SNR weighting's gamma (arXiv 2303.09556); None weighs every timestep alike."""
    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of conditionings replaced by zeros before the mapper while training."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """Where samples come from and how they are read."""

    dataset: DatasetName = DatasetName.AUTO
    folder: Path = Path("datasets/CC3M")
    train: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    feature_folder: Path | None = None
    """Precomputed VAE moments and Q-Former features; None encodes pictures in the step."""
    check_images: Literal["decode", "header", "exists", "none"] = "decode"
    """How a picture is checked at index time; the unreadable ones are counted, named and left out."""
    num_workers: int = Field(default=16, ge=0)
    tasks: tuple[str, ...] | None = None
    """Task variants to keep; None keeps the published choice for the split."""
    max_samples: int | None = Field(default=None, ge=1)
    context: Literal["full", "text", "last_text", "none"] = "full"
    """What a VIST prompt holds of the story before its step: texts and pictures, every text, the last text, or
    nothing. Other data sets take ``full`` alone."""
    random_flip: bool = True
    """Mirror training pictures at random (train split only)."""
    bucket_by_length: bool = False
    """Put training samples of similar length into one batch: less padding, another order of the samples."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainingConfig:
    """Optimisation, hardware and logging (paper section 4.1 and the published defaults)."""

    num_epochs: int = Field(default=2, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=2, ge=1)
    """Samples per device and step."""
    eval_batch_size: int = Field(default=2, ge=1)
    effective_batch_size: int = Field(default=48, ge=1)
    """Samples per optimizer step over all devices; gradients accumulate to reach it."""
    learning_rate: float = Field(default=2e-5, gt=0)
    mapper_learning_rate_factor: float = Field(default=10.0, gt=0)
    """Alignment stage only: the mapper's and its queries' learning rate is this many times larger."""
    warmup_steps: int = Field(default=1000, ge=0)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0)
    seed: int = 42
    precision: Literal["auto", "bf16-mixed", "16-mixed", "32-true"] = "auto"
    """auto: bf16-mixed on a GPU, 32-true on a CPU."""
    devices: Annotated[tuple[int, ...], AfterValidator(_each_once)] | None = None
    """GPU indices (``--gpus``); None takes all. On a machine without a GPU the CPU is used, with a notice."""
    num_nodes: int = Field(default=1, ge=1)
    strategy: str = "auto"
    val_check_interval: float | None = Field(default=None, gt=0, le=1)
    """Validations per epoch as a fraction; None: 0.25 for CC3M, 0.5 otherwise, as published."""
    sample_every_steps: int = Field(default=500, ge=0)
    """Optimizer steps between sample pictures; 0 writes none."""
    save_total_limit: int = Field(default=1, ge=1)
    loggers: tuple[Literal["csv", "tensorboard", "wandb"], ...] = ("csv", "tensorboard")
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for more time."""
    compile: bool = False
    """Compile language model, UNet and mapper with ``torch.compile``: minutes at the start, faster steps."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class GenerationConfig:
    """Decoding and sampling (published defaults)."""

    batch_size: int = Field(default=1, ge=1)
    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    """0 decodes greedily."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=50, ge=0)
    """transformers 4.31's default, which the published decoding inherited; 0 switches it off."""
    repetition_penalty: float = Field(default=2.0, gt=0)
    images: Literal["auto", "force", "never"] = "auto"
    """auto: a picture where the model emits vokens; force: every reply begins with one; never: text only."""
    num_inference_steps: int = Field(default=50, ge=1)
    guidance_scale: float = Field(default=7.5, ge=0)
    scheduler: Literal["default", "ddim", "dpm++"] = "default"
    """default: the scheduler of the Stable Diffusion folder (PNDM for 2.1-base)."""
    compile: bool = False
    """Compile the step that decodes a token: a minute at the start, faster steps where launching them takes longer
    than computing them, as on a GPU. Not for sample pictures and the web page."""
    baseline_images: bool = True
    """Also render Stable Diffusion's own picture of the caption, where a sample has one."""
    seed: int = 42


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MetricsConfig:
    """Feature networks of the scores: a name or local weights each."""

    clip_model: str | None = None
    """open_clip model name or folder; None: ViT-L-14 (CC3M, VIST) or ViT-B-32 (MMDialog), as published."""
    clip_pretrained: str = "openai"
    """open_clip pretrained tag or a weights file."""
    fid_network: str | None = None
    """None: torchmetrics' InceptionV3; else its weights file or a small network (see docs/metrics.md)."""
    inception_network: str | None = None
    sentence_encoder: str = "all-MiniLM-L6-v2"
    """sentence-transformers name or folder; ``clip``: the text tower of the CLIP model."""
    device: str = "auto"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PathsConfig:
    """Folders, from the published environment variables where set."""

    weights: Path = Path("weights")
    """WEIGHTFOLDER: checkpoints are read from and written to here."""
    checkpoints: Path | None = None
    """Where training writes its checkpoints and logs (``--output_dir``); None: ``weights``."""
    outputs: Path = Path("outputs")
    """OUTPUT_FOLDER."""
    output_suffix: str = ""
    """OUTPUT_SUFFIX, appended to the run's folder name."""
    cc3m: Path | None = None
    """CC3M_FOLDER: real pictures for CC3M's FID."""
    bundled_checkpoints: Path | None = None
    """Looked into for a checkpoint that the weights folder lacks (the tiny preset's shipped ones)."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig:
    """One run, resolved: every function below ``main()`` takes its part of this and reads nothing else."""

    stage: Stage = Stage.ALIGNMENT
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    generation: GenerationConfig = GenerationConfig()
    metrics: MetricsConfig = MetricsConfig()
    paths: PathsConfig = PathsConfig()
    is_training: bool = False
    model_save_name: str = "model_{epoch}-{step}"
    stage1_weight: Path | None = None
    test_weight: Path | None = None
    resume: Path | None = None


# Published environment variable → configuration key. Values are strings and validated like YAML's.
ENVIRONMENT = {
    "DATAFOLDER": "data.folder",
    "PREPROCESS_FEATURE_FOLDER": "data.feature_folder",
    "CC3M_FOLDER": "paths.cc3m",
    "WEIGHTFOLDER": "paths.weights",
    "OUTPUT_FOLDER": "paths.outputs",
    "OUTPUT_SUFFIX": "paths.output_suffix",
}
CONFIG_VARIABLE = "MINIGPT5_CONFIG"
STAGE_VARIABLE = "IS_STAGE2"
_STAGES = {
    **dict.fromkeys(("True", "true"), Stage.MULTIMODAL),
    **dict.fromkeys(("False", "false", "0", ""), Stage.ALIGNMENT),
}


def load_config(
    path: Path | None,
    overrides: Mapping[str, Any],
    environment: Mapping[str, str],
    sources: Mapping[str, str] | None = None,
) -> RunConfig:
    """Resolve one run's configuration.

    Args:
        path: YAML file (``--config``); None falls back to ``MINIGPT5_CONFIG``, then to the paper's preset.
            A path that does not exist below the working directory is looked up below the project's root.
        overrides: dotted key → value, the highest precedence (from flags).
        environment: ``os.environ`` or a stand-in; only the published variables are read.
        sources: key of ``overrides`` → the flag it came from, for messages; ``--set`` where it names none.

    Raises:
        InputError: a missing or malformed file, an unknown key, a value of the wrong type or range; the
            message lists every problem with its key and the flag, variable or file that set it.
    """
    named = environment.get(CONFIG_VARIABLE)
    if path is None and named:
        file = find_project_file(Path(named), CONFIG_VARIABLE)
    else:
        file = find_project_file(path or DEFAULT_CONFIG, "--config")
    values = _read_yaml(file, ())
    origins: dict[str, str] = {}
    if STAGE_VARIABLE in environment and "stage" not in overrides:
        _assign(values, "stage", _read_stage(environment[STAGE_VARIABLE]).value)
        origins["stage"] = STAGE_VARIABLE
    for variable, key in ENVIRONMENT.items():
        if environment.get(variable):
            _assign(values, key, environment[variable])
            origins[key] = variable
    for key, value in overrides.items():
        _assign(values, key, value)
        origins[key] = (sources or {}).get(key, "--set")
    return validate_config(values, str(file), origins)


def validate_config(values: Mapping[str, Any], source: str, origins: Mapping[str, str] | None = None) -> RunConfig:
    """Turn nested plain values into a :class:`RunConfig`.

    Args:
        values: as in a YAML file.
        source: where they come from.
        origins: dotted key → the flag or variable that set it instead.

    Raises:
        InputError: an unknown key or a value of the wrong type or range; every problem is listed with what set it.
    """
    try:
        return TypeAdapter(RunConfig).validate_python(dict(values))
    except ValidationError as error:
        raise InputError(explain_problems(error, RunConfig, source, origins or {})) from None


def _read_stage(text: str) -> Stage:
    if text not in _STAGES:
        raise InputError(
            f"{STAGE_VARIABLE}={text}: True (or true) means stage 2, False (or false, 0, nothing) stage 1; "
            "set one of them"
        )
    return _STAGES[text]


def find_project_file(path: Path, flag: str) -> Path:
    """Return ``path`` if it exists, else the same path below the project's root.

    Raises:
        InputError: neither exists.
    """
    for candidate in (path, PROJECT_ROOT / path):
        if candidate.is_file():
            return candidate.resolve()
    raise InputError(f"{flag} {path}: no such file (looked in {Path.cwd()} and {PROJECT_ROOT})")


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise InputError(f"{path}: `base` refers back to itself")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, found {type(values).__name__}")
    values = _resolve_paths(values, path.parent)
    base = values.pop("base", None)
    if base is None:
        return values
    base_path = Path(base)
    if not base_path.is_file():
        raise InputError(f"{path}: base file {base} does not exist (write it as ./name.yaml)")
    return _merge(_read_yaml(base_path.resolve(), (*seen, path)), values)


def _resolve_paths(value: Any, folder: Path) -> Any:
    """Make strings that begin with ./ or ../ absolute: they are relative to the YAML file they stand in."""
    if isinstance(value, dict):
        return {key: _resolve_paths(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve_paths(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str((folder / value).resolve())
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_nested else value
    return merged


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        nested = values.get(parent)
        values[parent] = dict(nested) if isinstance(nested, dict) else {}
        values = values[parent]
    values[last] = value
