"""Whole runs: :func:`train` and :func:`predict`, from one resolved configuration."""

import importlib.util
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch.multiprocessing import spawn
from torch.multiprocessing.spawn import ProcessRaisedException

from minigpt4.errors import InputError
from minigpt4.weights import read_torch_file
from minigpt5.callbacks import LastCheckpoint, SamplePictures, plain_name, publish_checkpoint
from minigpt5.checkpoint import FORMAT_KEY, find_checkpoint, load_checkpoint
from minigpt5.config import DatasetName, RunConfig, Stage, TrainingConfig
from minigpt5.data.module import DataModule
from minigpt5.data.readers import write_problems
from minigpt5.data.types import Split
from minigpt5.hardware import (
    Hardware,
    Place,
    check_machines,
    check_processes_here,
    choose_hardware,
    process_place,
    set_up_gpus,
    slurm_environment,
    started_by_slurm,
)
from minigpt5.model import MiniGPT5, build_model
from minigpt5.prediction_run import describe_run, predict_samples
from minigpt5.predictions import LEFT_OUT_FILE, PredictionStore, run_folder
from minigpt5.preflight import check_model, check_run
from minigpt5.strategies import SHARDED, choose_strategy
from minigpt5.training import TrainingModule, recompute_activations

LOG_EVERY_STEPS = 10
_TRAINER_STATE = ("loops", "optimizer_states", "lr_schedulers")


def train(config: RunConfig, callbacks: Sequence[Callback] = ()) -> Path:
    """Train one stage and return the published checkpoint: the best one under its plain name.

    Args:
        config: the run.
        callbacks: further Lightning callbacks.

    Raises:
        InputError: something the run needs is missing or cannot be used.
    """
    config = replace(config, is_training=True)
    check_run(config)
    hardware = choose_hardware(config.training)
    # both fail before anything is loaded
    choose_strategy(config, hardware)
    check_processes_here(hardware)
    check_machines(hardware, config.training)
    resume = None if config.resume is None else find_checkpoint(config.resume, config.paths, "--resume")
    if resume is not None:
        _check_resumable(resume, config)
    _quieten()
    seed_everything(config.training.seed, verbose=False)
    model = load_model(config, hardware)
    data = DataModule(config, model.tokenizer, model.voken_ids)
    hyper_parameters = TypeAdapter(RunConfig).dump_python(config, mode="json")
    is_cc3m = data.dataset_name(Split.TRAIN) is DatasetName.CC3M
    plan = plan_steps(config.training, len(data.index(Split.TRAIN)), hardware.device_count, is_cc3m=is_cc3m)
    if config.training.gradient_checkpointing:
        recompute_activations(model)
    if config.training.compile:
        model.compile_parts()
    module = TrainingModule(model, config.training, plan.total_steps, hyper_parameters)
    best = ModelCheckpoint(
        dirpath=checkpoint_folder(config),
        filename=config.model_save_name,
        monitor="val_loss",
        save_top_k=config.training.save_total_limit,
        save_on_train_epoch_end=False,
    )
    last = checkpoint_folder(config) / f"{plain_name(config.model_save_name)}-last.ckpt"
    try:
        checkpoint_folder(config).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{checkpoint_folder(config)}: cannot be written to ({error.strerror})") from None
    trainer = build_trainer(config, hardware, plan, [*callbacks, best, LastCheckpoint(last)])
    if trainer.is_global_zero:
        print(describe_size(model), file=sys.stderr)
        if plan.effective_batch_size != config.training.effective_batch_size:
            print(f"notice: {describe_batches(config.training, plan)}", file=sys.stderr)
        for split in (Split.TRAIN, Split.VALIDATION):
            report = (
                checkpoint_folder(config) / "logs" / plain_name(config.model_save_name) / f"left_out_{split}.jsonl"
            )
            write_problems(data.index(split).problems, report)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    target = checkpoint_folder(config) / f"{plain_name(config.model_save_name)}.ckpt"
    if trainer.is_global_zero:
        publish_checkpoint(Path(best.best_model_path or last), target)
    trainer.strategy.barrier("published")
    return target


def describe_size(model: MiniGPT5) -> str:
    """Return one line with how many parameters there are and how many of them train."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trainable = sum(count for count, trains in counts if trains)
    return f"{model.stage.value} stage: {trainable:,} of {sum(count for count, _ in counts):,} parameters train"


def checkpoint_folder(config: RunConfig) -> Path:
    """Return where training writes (``--output_dir``, else WEIGHTFOLDER)."""
    return config.paths.checkpoints or config.paths.weights


def load_model(config: RunConfig, hardware: Hardware, local_rank: int | None = None) -> MiniGPT5:
    """Build the model of a run; stage 2 starts from its stage 1 checkpoint.

    Args:
        config: the run.
        hardware: its devices and precision.
        local_rank: which of this machine's processes it is for; None asks ``torchrun`` or SLURM.

    Raises:
        InputError: missing or wrong weights.
    """
    if hardware.gpus:
        set_up_gpus()
    device = hardware.device(process_place().local_rank if local_rank is None else local_rank)
    if config.is_training and config.training.strategy == SHARDED:
        device = torch.device("cpu")  # one card may not hold the language model that several share out
    model = build_model(config.model, config.loss, config.stage, hardware.frozen_dtype, device)
    for report in model.reports:
        print(report, file=sys.stderr)
    for flag, path in _checkpoints(config).items():
        stage = Stage.ALIGNMENT if flag == "--stage1_weight" else config.stage
        given = config.test_weight if flag == "--test_weight" else config.stage1_weight
        if path.parent == config.paths.bundled_checkpoints and given != path:
            notice = f"notice: {flag}: not in {config.paths.weights}; the preset's bundled one is used"
            print(notice, file=sys.stderr)
        print(load_checkpoint(model, path, stage, flag), file=sys.stderr)
    return model


@dataclass(frozen=True)
class StepPlan:
    """How a run's batches become optimizer steps and validations."""

    accumulate: int
    """Batches of one optimizer step."""
    validate_every: int
    """Batches between validations."""
    total_steps: int
    """Optimizer steps of the whole run."""
    effective_batch_size: int
    """Samples of one optimizer step, over all devices: as many as whole batches make of the wanted number, but a
    batch of each device at least."""


def plan_steps(training: TrainingConfig, samples: int, processes: int, *, is_cc3m: bool) -> StepPlan:
    """Return how many batches make a step, as published, and where validations fall.

    They fall near the wanted fraction of an epoch but at the end of an optimizer step, so that a checkpoint
    written then never misses gradients that were half accumulated.

    Args:
        training: batch sizes, epochs, limits.
        samples: training samples.
        processes: on each machine.
        is_cc3m: decides the published fraction: 0.25 for CC3M, 0.5 otherwise.
    """
    world = processes * training.num_nodes
    batches = math.ceil(math.ceil(samples / world) / training.batch_size)
    accumulate = max(1, training.effective_batch_size // (training.batch_size * world))
    fraction = training.val_check_interval or (0.25 if is_cc3m else 0.5)
    between = max(1, round(batches * fraction / accumulate)) * accumulate
    steps = training.num_epochs * math.ceil(batches / accumulate)
    effective = accumulate * training.batch_size * world
    return StepPlan(accumulate, min(batches, between), min(steps, training.max_steps or steps), effective)


def describe_batches(training: TrainingConfig, plan: StepPlan) -> str:
    """Return one line with how many samples an optimizer step takes, and why."""
    made_of = f"{plan.accumulate} batches of {training.batch_size} on each device"
    wanted = f"not the {training.effective_batch_size} of --real_batch_size"
    return f"{plan.effective_batch_size} samples an optimizer step ({made_of}), {wanted}"


def build_trainer(config: RunConfig, hardware: Hardware, plan: StepPlan, callbacks: list[Callback]) -> Trainer:
    """Return the Trainer of a run with its loggers and sample pictures."""
    training = config.training
    folder = checkpoint_folder(config) / "logs"
    name = plain_name(config.model_save_name)
    loggers = build_loggers(training.loggers, folder, name)
    samples = SamplePictures(folder / name / "samples", training.sample_every_steps, config.generation)
    monitors: list[Callback] = [LearningRateMonitor("step")] if loggers else []
    try:
        return Trainer(
            default_root_dir=folder,
            accelerator="gpu" if hardware.gpus else "cpu",
            devices=list(hardware.gpus) or hardware.cpu_processes,
            num_nodes=training.num_nodes,
            strategy=choose_strategy(config, hardware),
            precision=hardware.precision,  # type: ignore[arg-type]
            max_epochs=training.num_epochs,
            max_steps=training.max_steps or -1,
            accumulate_grad_batches=plan.accumulate,
            gradient_clip_val=training.max_grad_norm,
            val_check_interval=plan.validate_every,
            log_every_n_steps=LOG_EVERY_STEPS,
            # The data module's samplers share the samples already.
            use_distributed_sampler=False,
            plugins=[slurm_environment()] if started_by_slurm() else None,
            logger=loggers or False,
            enable_model_summary=False,
            callbacks=[TQDMProgressBar(LOG_EVERY_STEPS), samples, *monitors, *callbacks],
        )
    except ValueError as error:
        raise InputError(f"--strategy {training.strategy}, --precision {training.precision}: {error}") from None


def build_loggers(names: Sequence[str], folder: Path, name: str) -> list[Logger]:
    """Return the configured loggers, writing below ``folder/name``.

    Raises:
        InputError: a logger's package is not installed.
    """
    csv = CSVLogger(folder, name)
    made: list[Logger] = []
    for kind in dict.fromkeys(names):
        package = {"tensorboard": "tensorboard", "wandb": "wandb"}.get(kind)
        if package and importlib.util.find_spec(package) is None:
            raise InputError(f"--loggers {kind}: the package is not installed; run: pip install {package}")
        if kind == "csv":
            made.append(csv)
        elif kind == "tensorboard":
            made.append(TensorBoardLogger(folder, name, version=csv.version))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            made.append(WandbLogger(name=name, save_dir=folder, project="MiniGPT5_Model"))
    return made


def open_model(config: RunConfig) -> MiniGPT5:
    """Return a trained model that is ready to generate, on the run's first GPU or the CPU.

    Args:
        config: names the checkpoints: ``test_weight``, and ``stage1_weight`` for stage 2.

    Raises:
        InputError: a checkpoint or weight file is missing or cannot be used.
    """
    config = replace(config, is_training=False)
    check_model(config)
    hardware = choose_hardware(config.training)
    return load_model(config, hardware, 0).place(hardware.device(0)).eval()


def predict(config: RunConfig) -> Path:
    """Generate a reply for every test sample and return the prediction store's folder.

    Under ``torchrun`` or SLURM each process takes its share; given several GPUs, one process is started on each.

    Raises:
        InputError: something the run needs is missing or cannot be used.
    """
    config = replace(config, is_training=False)
    check_run(config)
    assert config.test_weight is not None and config.data.test is not None
    hardware = choose_hardware(config.training)
    folder = run_folder(config.paths.outputs, config.test_weight, config.paths.output_suffix)
    place = process_place()
    check_processes_here(hardware)
    if place.world > 1 or len(hardware.gpus) <= 1:
        _predict_share(place, config, hardware, folder)
        return folder
    processes = len(hardware.gpus)
    try:
        spawn(_predict_spawned, args=(processes, config, hardware, folder), nprocs=processes)
    except ProcessRaisedException as error:
        _, found, message = str(error).rpartition(f"{InputError.__name__}: ")
        if found:
            raise InputError(message.strip()) from None
        raise
    return folder


def _predict_spawned(rank: int, world: int, config: RunConfig, hardware: Hardware, folder: Path) -> None:
    _predict_share(Place(rank, rank, world), config, hardware, folder)


def _predict_share(place: Place, config: RunConfig, hardware: Hardware, folder: Path) -> None:
    """Answer every ``world``-th sample, beginning with sample ``rank``."""
    _quieten()
    seed_everything(config.generation.seed, verbose=False)
    model = load_model(config, hardware, place.local_rank).place(hardware.device(place.local_rank))
    data = DataModule(config, model.tokenizer, model.voken_ids)
    dataset = data.dataset_name(Split.TEST).value
    index = data.index(Split.TEST)
    assert config.data.test is not None
    run = describe_run(config, dataset, config.data.folder / config.data.test, _checkpoints(config))
    store = PredictionStore(folder, run, place.rank)
    if place.rank == 0:
        write_problems(index.problems, folder / LEFT_OUT_FILE)
    samples = {number: index[number] for number in range(place.rank, len(index), place.world)}
    predict_samples(model, samples, store, config.generation, dataset)


def _checkpoints(config: RunConfig) -> dict[str, Path]:
    """Return flag → checkpoint file, in loading order."""
    named = {}
    if config.stage is Stage.MULTIMODAL:
        named["--stage1_weight"] = config.stage1_weight
    if not config.is_training:
        named["--test_weight"] = config.test_weight
    return {flag: find_checkpoint(name, config.paths, flag) for flag, name in named.items() if name is not None}


def _check_resumable(path: Path, config: RunConfig) -> None:
    content: dict[str, Any] = read_torch_file(path, "--resume")
    absent = [key for key in _TRAINER_STATE if key not in content]
    if absent:
        raise InputError(
            f"--resume: {path}: no training state in it (lacks {', '.join(absent)}); give a checkpoint that "
            "train_eval.py wrote, e.g. the one ending in -last.ckpt"
        )
    stage = content.get(FORMAT_KEY, {}).get("stage")
    if stage != config.stage.value:
        raise InputError(f"--resume: {path}: belongs to stage {stage}, this run is of stage {config.stage.value}")


def _quieten() -> None:
    """Silence Lightning's advice, most of it about what is meant here: frozen parts in eval mode, few workers."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*in eval mode at the start of training.*",
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*is smaller than the logging interval.*",
        ".*treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)
