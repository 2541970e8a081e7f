"""The loop that every part is trained by: AdamW, warm-up and cosine decay, average of weights, resuming.

Each step draws all it needs from (seed, part, step), so a run that was killed goes on as if it had not been.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from minigpt4.errors import InputError
from minigpt4.weights import read_torch_file
from minigpt5.generation import sample_seed

STATES = "pretraining"
"""Folder of the checkpoints, below the weights."""
LossOf = Callable[[torch.Generator], Mapping[str, Tensor]]
_PLAIN, _RISING = 1 / 3, 2 / 9
"""Shares of the steps of an objective that is easy at first, and in which it becomes as hard as it will be."""


@dataclass(frozen=True)
class Recipe:
    """How a part is trained."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    final_rate: float = 0.02
    """Learning rate of the last step, relative to the highest."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    """Highest decay of the average of weights; it grows towards it as (1 + step) / (10 + step)."""
    version: int = 1
    """Raised when what a part minimises changes: what was trained by another version is trained anew."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.steps))))
        return self.learning_rate * warm * (self.final_rate + (1 - self.final_rate) * falling)


@dataclass(frozen=True)
class Place:
    """Where and how a part runs.

    Attributes:
        folder: the weights folder.
        seed: decides every draw.
        device: where the models are.
        save_seconds: time between checkpoints.
        row: line of the progress bar, where several parts run at once.
    """

    folder: Path
    seed: int
    device: torch.device
    save_seconds: float = 60.0
    row: int = 0

    def state_path(self, part: str) -> Path:
        """Return the checkpoint of a part."""
        return self.folder / STATES / f"{part}.pt"

    def start_path(self, part: str) -> Path:
        """Return the folder of the weights that a part went on from, laid out as in the weights folder."""
        return self.folder / STATES / f"{part}-start"

    def record_path(self, part: str) -> Path:
        """Return the file that says that a part is done, and how."""
        return self.folder / STATES / f"{part}.json"


def train(
    part: str, module: nn.Module, loss_of: LossOf, recipe: Recipe, place: Place, pool_size: int | None = None
) -> dict[str, float]:
    """Train ``module`` in place; it ends with the average of its weights.

    Modules stay in eval mode: no part uses dropout, whose draws could not be repeated.

    Args:
        part: names checkpoint and progress bar.
        module: its parameters that require gradients are trained.
        loss_of: a step's random source → named losses; ``loss`` is minimised.
        recipe: how.
        place: where.
        pool_size: pictures rendered for training, where it draws from a pool.

    Returns:
        Smoothed losses of the last steps, and steps and seconds of all runs together.

    Raises:
        InputError: the checkpoint is damaged or of other settings.
        KeyboardInterrupt: on Ctrl-C, with the checkpoint written.
        FloatingPointError: the loss is no number.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    average = EMAModel(parameters, decay=recipe.ema_decay)
    run = _Run(part, module, optimizer, average, recipe, place, pool_size)
    run.resume()
    module.eval()
    bar = tqdm(total=recipe.steps, initial=run.step, desc=part, position=place.row, mininterval=1.0)
    started = saved = time.monotonic()
    already = run.seconds
    try:
        while run.step < recipe.steps:
            run.advance(loss_of)
            bar.update()
            bar.set_postfix({name: f"{value:.4f}" for name, value in run.recent.items()}, refresh=False)
            now = time.monotonic()
            run.seconds = already + now - started
            if now - saved >= place.save_seconds:
                run.save()
                saved = now
    except KeyboardInterrupt:
        # In the middle of an update, the last checkpoint is the last state to go on from.
        if run.is_whole:
            run.save()
        raise
    bar.close()
    run.save()
    average.copy_to(parameters)
    return {**run.recent, "steps": run.step, "seconds": run.seconds}


def write_record(place: Place, part: str, values: Mapping[str, object]) -> None:
    """Say that a part is done."""
    _replace(place.record_path(part), (json.dumps(dict(values), indent=1) + "\n").encode())


def read_record(place: Place, part: str) -> dict[str, Any]:
    """Return how a part was trained; empty for one that is not done."""
    path = place.record_path(part)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def is_done(place: Place, part: str, recipe: Recipe | None = None) -> bool:
    """Whether a part has been trained to its end and exported, by ``recipe`` or more of its steps if given."""
    made = read_record(place, part)
    if not made or recipe is None:
        return bool(made)
    done = {"version": 1, **made["recipe"]}
    return done["steps"] >= recipe.steps and {**done, "steps": recipe.steps} == asdict(recipe)


def forget_other_version(place: Place, part: str, recipe: Recipe) -> None:
    """Remove a part's checkpoint if another version of its recipe left it.

    Raises:
        InputError: it cannot be read.
    """
    path = place.state_path(part)
    if path.is_file() and read_torch_file(path, "--out").get("settings", {}).get("version", 1) != recipe.version:
        path.unlink()


def refuse_other_settings(path: Path, made: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Raise an :class:`InputError` if a file of pretraining was made with other settings.

    Args:
        path: the file, for the message.
        made: its settings; what an older file lacks is no difference.
        wanted: those of this run.
    """
    others = [
        f"{name} {made[name]} (now {value})"
        for name, value in wanted.items()
        if name in made and made[name] != value
    ]
    if others:
        raise InputError(f"{path}: made with other settings: {', '.join(others)}; give another --out or remove it")


class Scheduled:
    """An objective that is easy at first: what makes it hard comes after a third of the steps, in full after 5/9.

    Args:
        steps: of the whole training.
    """

    step: int = 0
    """Steps taken, set before each."""

    def __init__(self, steps: int) -> None:
        self._plain, self._rising = round(steps * _PLAIN), max(1, round(steps * _RISING))

    @property
    def hardness(self) -> float:
        """What makes the objective hard is weighted by it: 0 to 1."""
        return min(1.0, max(0.0, (self.step - self._plain) / self._rising))


class _Run:
    """What a checkpoint holds: step, weights, average, optimizer, smoothed losses, seconds."""

    def __init__(
        self,
        part: str,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: EMAModel,
        recipe: Recipe,
        place: Place,
        pool_size: int | None,
    ) -> None:
        self.path = place.state_path(part)
        self.module, self.optimizer, self.average = module, optimizer, average
        self.recipe, self.source = recipe, (place.seed, part)
        # Plain numbers decide what a step does; more steps may be asked of a finished run.
        self.settings = {**asdict(recipe), "seed": place.seed}
        if pool_size is not None:
            self.settings["pool"] = pool_size
        self.step = 0
        self.seconds = 0.0
        self.recent: dict[str, float] = {}
        self.is_whole = True
        """False while weights, moments and average are not of the same step."""

    def advance(self, loss_of: LossOf) -> None:
        """Take one step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        if isinstance(loss_of, Scheduled):
            loss_of.step = self.step
        seed, part = self.source
        losses = loss_of(torch.Generator().manual_seed(sample_seed(seed, part, self.step)))
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        parameters = self.optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(parameters, self.recipe.max_grad_norm, error_if_nonfinite=True)
        self.is_whole = False
        self.optimizer.step()
        self.average.step(parameters)
        self.record({name: float(value.detach()) for name, value in losses.items()})
        self.is_whole = True

    def record(self, losses: Mapping[str, float]) -> None:
        """Count a step and smooth its losses."""
        weight = 1 / min(self.step + 1, 100)
        self.step += 1
        self.recent = {
            name: self.recent.get(name, value) * (1 - weight) + value * weight for name, value in losses.items()
        }

    def save(self) -> None:
        """Write the checkpoint; a kill while writing leaves the last one whole."""
        content = {
            "settings": self.settings,
            "step": self.step,
            "seconds": self.seconds,
            "recent": self.recent,
            "model": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.path.with_suffix(".new")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        temporary.replace(self.path)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if not self.path.is_file():
            return
        content = read_torch_file(self.path, "--out")
        wanted = {name: value for name, value in self.settings.items() if name != "steps"}
        refuse_other_settings(self.path, content.get("settings", {}), wanted)
        try:
            self.module.load_state_dict(content["model"])
            self.average.load_state_dict(content["average"])
            self.average.to(next(self.module.parameters()).device)  # the checkpoint was read to the CPU
            self.optimizer.load_state_dict(content["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.path}: does not fit ({reason}); give another --out or remove it") from None
        self.step, self.seconds, self.recent = content["step"], content["seconds"], content["recent"]
        planned, asked = content["settings"]["steps"], self.settings["steps"]
        if self.step < planned != asked:
            raise InputError(
                f"{self.path}: ended at step {self.step} of {planned}; with {asked} steps it would go on by "
                "another schedule than it began with; give the same --scale, or remove it"
            )


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".new")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content)
    temporary.replace(path)
