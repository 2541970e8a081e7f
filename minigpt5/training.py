"""Training as a LightningModule: steps, optimizer groups, schedule, and which weights a checkpoint holds."""

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from minigpt4.errors import InputError
from minigpt4.weights import raise_for_keys
from minigpt5.checkpoint import FORMAT_KEY, check_stage1, checkpoint_mark, trainable_state
from minigpt5.config import TrainingConfig
from minigpt5.data.types import Batch
from minigpt5.generation import sample_seed
from minigpt5.losses import Losses
from minigpt5.model import MiniGPT5
from minigpt5.strategies import SHARDED, is_sharded, shard_frozen


class TrainingModule(LightningModule):
    """The model with its losses logged and its optimizer set up.

    Every draw depends on the seed, the epoch and the sample's id alone, so an interrupted run continues exactly
    and the validation loss is comparable between epochs.

    Args:
        model: what is trained.
        config: optimisation settings.
        total_steps: optimizer steps of the whole run, for the learning rate's decay. Lightning's own estimate
            would load the training data before a resumed loader's position is restored, and lose it.
        hyper_parameters: plain values kept in every checkpoint and shown by the loggers.
    """

    def __init__(
        self, model: MiniGPT5, config: TrainingConfig, total_steps: int, hyper_parameters: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.total_steps = total_steps
        self.save_hyperparameters(hyper_parameters)

    def configure_model(self) -> None:
        """Share out the frozen layers (``--strategy fsdp``); called once the processes know each other."""
        if self.config.strategy == SHARDED and self.trainer.world_size > 1 and not is_sharded(self.model):
            shard_frozen(self.model, self)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the adapter's dropout, the only randomness that is not drawn per sample."""
        ids = [sample.id for sample in batch.samples]
        torch.manual_seed(sample_seed(self.config.seed, self.current_epoch, ids, "dropout"))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch (paper equation 7)."""
        draws = self.model.draw(batch, seed=self.config.seed, epoch=self.current_epoch, training=True)
        losses = self.model(batch, draws)
        self._log_losses("train", losses, batch.size)
        return losses.total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss of a batch without condition dropout, with the same draws in every epoch."""
        draws = self.model.draw(batch, seed=self.config.seed, epoch=0, training=False)
        self._log_losses("val", self.model(batch, draws), batch.size)

    def _log_losses(self, prefix: str, losses: Losses, batch_size: int) -> None:
        for name, value in losses.as_dict().items():
            key, value = f"{prefix}_{name}", value.detach()
            if prefix == "train":
                # This process's own: a mean over all of them would stop every one in every batch.
                self.log(f"{key}_step", value, prog_bar=True, on_step=True, on_epoch=False)
                key = f"{key}_epoch"
            # Every process has the same terms: within a data set all samples have a caption, or none has.
            self.log(
                key, value, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True, batch_size=batch_size
            )

    def cpu(self) -> "TrainingModule":
        """Stay where it is: at its end, Lightning would copy the whole model to the host, once a process."""
        return self

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW with linear warm-up and decay to zero over the whole run (paper section 4.1)."""
        optimizer = build_optimizer(self.model, self.config)
        schedule = get_linear_schedule_with_warmup(
            optimizer,
            num_warmup_steps=self.config.warmup_steps,
            num_training_steps=self.total_steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trainable weights only: the frozen ones come from their own files."""
        checkpoint["state_dict"] = trainable_state(self.model)
        checkpoint[FORMAT_KEY] = checkpoint_mark(self.model.stage, self.model.stage1)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a run goes on with the stage-1 weights it began with.

        Raises:
            InputError: they are others.
        """
        if self.model.config.mapper.stage2_trains != "whole":
            check_stage1(self.model, checkpoint[FORMAT_KEY], str(self.trainer.ckpt_path), "--resume")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Put a checkpoint's trainable weights back (``--resume``); the frozen ones are in place already.

        Raises:
            InputError: other weights are trainable in this run than in the checkpoint's, or of another size.
        """
        trainable = trainable_state(self.model)
        missing, unexpected = (
            sorted(trainable.keys() - state_dict.keys()),
            sorted(state_dict.keys() - trainable.keys()),
        )
        raise_for_keys("--resume", "this run's training state", missing, unexpected)
        wrong = [
            f"{name} {tuple(state_dict[name].shape)} (now {tuple(value.shape)})"
            for name, value in trainable.items()
            if state_dict[name].shape != value.shape
        ]
        if wrong:
            raise InputError(f"--resume: made with other settings of the model: {', '.join(wrong[:4])}")
        with torch.no_grad():
            for name, value in trainable.items():
                value.copy_(state_dict[name])
        return torch.nn.modules.module._IncompatibleKeys([], [])


def build_optimizer(model: MiniGPT5, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over what trains: the language side, and the mapper at its own rate (paper section 4.1)."""
    return torch.optim.AdamW(
        model.trainable_groups(config),
        lr=config.learning_rate,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        # The fused step could unscale gradients itself, and with such a one Lightning does not clip.
        fused=config.precision != "16-mixed" and config.max_grad_norm is None,
    )


def recompute_activations(model: MiniGPT5) -> None:
    """Let the backward pass recompute activations of the UNet and the language model: less memory, more time.

    Only where there are any: in the alignment stage nearly all of the language model runs without a graph.

    transformers recomputes in layers that are in training mode only. LLaMA's layers have no dropout of their own,
    so the mode of the frozen layers changes nothing else.
    """
    model.diffusion.unet.enable_gradient_checkpointing()
    llama = model.backbone.language_model
    if not any(parameter.requires_grad for parameter in llama.parameters()):
        return
    llama.gradient_checkpointing_enable({"use_reentrant": False})

    def follow_mode(module: torch.nn.Module, _: Any) -> None:
        for layer in llama.model.layers:
            layer.training = module.training

    model.register_forward_pre_hook(follow_mode)
