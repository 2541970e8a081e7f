"""What a job does: train, or predict and measure; each in a log file of its own."""

import json
import shutil
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from minigpt5.config import RunConfig
from minigpt5.tinyworld.experiments.plan import Cell, Prediction, Training


def train(training: Training) -> None:
    """Train anew and keep the last state: every variant is compared after the same number of steps."""
    from minigpt5 import runs
    from minigpt5.callbacks import plain_name

    folder = runs.checkpoint_folder(training.config)
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
    runs.train(_on_one_device(training.config))
    last = folder / f"{plain_name(training.config.model_save_name)}-last.ckpt"
    training.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    last.replace(training.checkpoint)
    shutil.rmtree(folder)


def measure(prediction: Prediction) -> dict[str, Any]:
    """Predict what is not predicted yet and return share name → right, total and value."""
    from minigpt5.runs import predict
    from minigpt5.tinyworld.quality import score_folder

    shares = score_folder(predict(_on_one_device(prediction.config)))
    return {share.name: {"right": share.right, "total": share.total, "value": share.value} for share in shares}


def _on_one_device(config: RunConfig) -> RunConfig:
    """Return a job's settings for one GPU; several take a program each, with an ``--out`` of its own."""
    import torch

    if not torch.cuda.is_available():
        return config
    return replace(config, training=replace(config.training, devices=(0,)))


def measure_cells(prediction: Prediction, cells: list[Cell], *, is_new: bool) -> None:
    """Measure a prediction and write the result of every cell that it belongs to.

    Args:
        prediction: whose.
        cells: they share it.
        is_new: the model was trained anew, so replies of an earlier one do not count.
    """
    if is_new:
        shutil.rmtree(prediction.config.paths.outputs, ignore_errors=True)
    measures = measure(prediction)
    for cell in cells:
        result = {
            "key": prediction.key,
            "comparison": cell.comparison,
            "variant": cell.variant,
            "seed": cell.seed,
            "overrides": dict(cell.overrides),
            "measures": measures,
        }
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        partial = cell.path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        partial.replace(cell.path)


def run_logged(log: Path, work: Callable[[], None]) -> str | None:
    """Do some work with everything it prints in a log file; returns why it failed, or None.

    A failure of any kind is this job's alone: the other jobs go on.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            work()
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None
