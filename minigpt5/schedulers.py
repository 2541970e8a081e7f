"""Noise schedulers of Stable Diffusion: the class a folder asks for, and the schedule that training draws from."""

from pathlib import Path
from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from minigpt4.errors import InputError
from minigpt4.weights import read_json

SCHEDULERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
"""Values of ``generation.scheduler`` beside ``default``."""
SAMPLERS = {
    sampler.__name__: sampler
    for sampler in (
        PNDMScheduler,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    )
}
"""Classes that a Stable Diffusion folder may name. None draws noise while it samples, so that a picture depends on
its own initial latents alone."""
PREDICTION_TYPES = ("epsilon", "v_prediction")


def load_scheduler(folder: Path, flag: str) -> Any:
    """Load the scheduler of a diffusers folder, as the class that it names.

    Args:
        folder: holds ``scheduler/scheduler_config.json``; where that names no class, ``model_index.json`` does.
        flag: named in messages.

    Raises:
        InputError: no class, one that is not known or draws noise, a prediction that training has no target for,
            or values the class refuses.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    values = read_json(path, flag)
    name = values.get("_class_name") or _indexed_class(folder, flag)
    known = ", ".join(SAMPLERS)
    if name not in SAMPLERS:
        raise InputError(
            f"{flag}: {path}: scheduler _class_name {name!r} cannot be used; name one of {known}, which share "
            "the noise schedule"
        )
    if str(values.get("algorithm_type")).startswith("sde-"):
        raise InputError(
            f"{flag}: {path}: algorithm_type {values['algorithm_type']} draws noise in every step, so replies "
            f"would depend on their batch; use {values['algorithm_type'].removeprefix('sde-')}"
        )
    prediction = values.get("prediction_type", PREDICTION_TYPES[0])
    if prediction not in PREDICTION_TYPES:
        raise InputError(
            f"{flag}: {path}: prediction_type {prediction!r} cannot be trained; known are "
            f"{' and '.join(PREDICTION_TYPES)}"
        )
    try:
        return SAMPLERS[name].from_pretrained(folder / "scheduler")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{flag}: {path}: cannot be loaded as {name}: {error}") from None


def make_sampler(name: str, scheduler: Any) -> Any:
    """Return a fresh sampler of a ``generation.scheduler`` with the noise schedule of a folder's scheduler."""
    sampler = SCHEDULERS.get(name, type(scheduler))
    # Latents are no pictures in [-1, 1]; DDIM's default would cut them off there.
    further = {"clip_sample": False} if sampler is DDIMScheduler else {}
    return sampler.from_config(scheduler.config, **further)


def training_schedule(scheduler: Any) -> DDPMScheduler:
    """Return the forward process (arXiv 2006.11239) with a sampler's betas.

    Samplers add noise each in their own units (Euler's is scaled by sigma, DPM-Solver's follows its sampling
    steps), while the UNet is trained on the variance-preserving process whatever samples it.
    """
    return DDPMScheduler.from_config(scheduler.config)


def _indexed_class(folder: Path, flag: str) -> str | None:
    index = folder / "model_index.json"
    entry = read_json(index, flag).get("scheduler") if index.is_file() else None
    return entry[-1] if isinstance(entry, list) and entry else None
