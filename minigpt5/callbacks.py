"""What happens beside the training steps: sample pictures, the newest checkpoint, publishing the best one."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import Logger, TensorBoardLogger

from minigpt5.config import GenerationConfig
from minigpt5.data.types import Batch, Reply, Sample
from minigpt5.prediction_run import open_prompt
from minigpt5.strategies import is_sharded

SAMPLES_FILE = "samples.jsonl"


class SamplePictures(Callback):
    """Every some steps, reply to the first prompt of the current batch and keep text and pictures.

    Pictures go to ``folder`` as PNG, the texts to ``folder/samples.jsonl``, and both to loggers that show
    pictures. Only the first process does this.

    Args:
        folder: made when the first sample is written.
        every_steps: optimizer steps between samples; 0 writes none.
        generation: decoding settings.
    """

    def __init__(self, folder: Path, every_steps: int, generation: GenerationConfig) -> None:
        self.folder = folder
        self.every_steps = every_steps
        # One reply is not worth compiling for, and the layers that fsdp gathers cannot be.
        self.generation = replace(generation, compile=False)
        self._last_step = 0
        self._batch: Batch | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Write a sample when an optimizer step that is due was just made."""
        self._batch = batch
        step = trainer.global_step
        due = self.every_steps > 0 and step % self.every_steps == 0 and step != self._last_step
        if due:
            self._sample(trainer, pl_module, batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write one of the finished model, so that a short run has a sample too."""
        seen = self._last_step == trainer.global_step
        if self.every_steps > 0 and self._batch is not None and not seen:
            self._sample(trainer, pl_module, self._batch)

    def _sample(self, trainer: Trainer, pl_module: LightningModule, batch: Batch) -> None:
        # With accumulation, several batches end at the same step.
        step = self._last_step = trainer.global_step
        model: Any = pl_module.model
        sample = batch.samples[0]
        if is_sharded(model):
            # Its layers come from all processes, so all of them have to run it, equally often.
            sample = trainer.strategy.broadcast(sample)
        elif not trainer.is_global_zero:
            return
        reply = model.generate([open_prompt(sample)], self.generation)[0]
        if not trainer.is_global_zero:
            return
        self._write(step, sample, reply)
        for logger in trainer.loggers:
            log_reply(logger, reply, step)

    def _write(self, step: int, sample: Sample, reply: Reply) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        names = []
        for index, picture in enumerate(reply.images):
            names.append(f"{step:08d}.png" if index == 0 else f"{step:08d}_{index}.png")
            picture.save(self.folder / names[-1])
        line = {
            "step": step,
            "id": sample.id,
            "prompt": sample.prompt,
            "input_images": [str(path) for path in sample.input_images],
            "reply": reply.raw_text,
            "images": names,
            "target": sample.response,
            "caption": sample.caption,
        }
        with (self.folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def log_reply(logger: Logger, reply: Reply, step: int) -> None:
    """Show a reply in TensorBoard or Weights & Biases; other loggers keep no pictures."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("sample", reply.raw_text, step)
        for index, picture in enumerate(reply.images):
            logger.experiment.add_image(f"sample/{index}", np.asarray(picture), step, dataformats="HWC")
    elif reply.images and hasattr(logger, "log_image"):
        captions = [reply.raw_text] * len(reply.images)
        logger.log_image("sample", list(reply.images), step=step, caption=captions)


class LastCheckpoint(Checkpoint):
    """Overwrite one file with the newest state: after every validation and at every epoch's end.

    ``ModelCheckpoint(save_last=True)`` writes only when the monitored loss improved, which is not where an
    interrupted run should continue.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless this was the check before training."""
        if not trainer.sanity_checking:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what came after the epoch's last validation."""
        # The first process's progress bar has averaged the epoch's metrics over all processes by now. The others
        # have to take part before they wait for each other to save, or none ever goes on.
        _ = trainer.callback_metrics
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        # A kill while writing must not cost the only state to continue from.
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            if self.path.is_dir():  # DeepSpeed's checkpoints are folders
                shutil.rmtree(self.path)
            partial.replace(self.path)


def plain_name(pattern: str) -> str:
    """Return a checkpoint pattern without its placeholders: ``stage1_cc3m_{epoch}-{step}`` → ``stage1_cc3m``."""
    folder, _, name = pattern.rpartition("/")
    plain = re.sub(r"[-_.=\s]*\{[^{}]*\}", "", name).strip("-_.= ") or "model"
    return f"{folder}/{plain}" if folder else plain


def publish_checkpoint(best: Path, target: Path) -> Path:
    """Copy the best checkpoint to its plain name, so that the next command finds it.

    A file that is already there, perhaps a downloaded checkpoint, is kept under the next free ``-vN`` name.
    """
    if best.resolve() == target.resolve():  # Lightning's paths have no symbolic links, a run's may
        return target
    partial = target.with_suffix(".partial")
    if best.is_dir():
        shutil.copytree(best, partial)
    else:
        shutil.copyfile(best, partial)
    if target.exists():
        kept = _free_name(target)
        target.rename(kept)
        print(f"notice: {target} was there already; kept as {kept.name}", file=sys.stderr)
    partial.replace(target)
    return target


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_stem(f"{path.stem}-v{number}")).exists():
        number += 1
    return candidate
