"""Which devices and which precision a run uses."""

import os
import sys
from dataclasses import dataclass

import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment

from minigpt4.errors import InputError
from minigpt5.config import TrainingConfig

FROZEN_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": torch.float32}


@dataclass(frozen=True)
class Hardware:
    """Devices and precision of one run. ``gpus`` is empty on a machine without a GPU."""

    gpus: tuple[int, ...]
    precision: str
    cpu_processes: int = 1

    @property
    def device_count(self) -> int:
        """Processes on this machine: one a GPU, or those ``torchrun`` started on the CPU."""
        return len(self.gpus) or self.cpu_processes

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Type of the frozen parts; trainable parts are float32 always."""
        return FROZEN_DTYPES[self.precision]

    def device(self, local_rank: int) -> torch.device:
        """Return the device of one process on this machine."""
        return torch.device("cuda", self.gpus[local_rank % len(self.gpus)]) if self.gpus else torch.device("cpu")


def choose_hardware(training: TrainingConfig) -> Hardware:
    """Return the asked-for GPUs, or the CPU with a notice where there is none.

    Raises:
        InputError: a GPU index that this machine, which has GPUs, does not have.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if available == 0:
        if training.devices is not None:
            print("notice: no GPU on this machine; --gpus is ignored and the CPU is used", file=sys.stderr)
        if training.precision == "16-mixed":
            notice = "notice: no GPU on this machine; --precision 16-mixed needs one and 32-true is used"
            print(notice, file=sys.stderr)
        precision = "32-true" if training.precision in ("auto", "16-mixed") else training.precision
        return Hardware((), precision, _cpu_processes())
    gpus = tuple(range(available)) if training.devices is None else training.devices
    absent = [str(index) for index in gpus if index >= available]
    if absent:
        raise InputError(f"--gpus: no GPU {', '.join(absent)}; this machine has 0 to {available - 1}")
    return Hardware(gpus, "bf16-mixed" if training.precision == "auto" else training.precision)


@dataclass(frozen=True)
class Place:
    """Which of the processes this is."""

    local_rank: int
    """Among those on this machine."""
    rank: int
    world: int


def process_place() -> Place:
    """Return which process this is, as ``torchrun`` or SLURM's ``srun`` say; the only one otherwise."""
    if "WORLD_SIZE" not in os.environ and SLURMEnvironment.detect():
        slurm = SLURMEnvironment()
        return Place(slurm.local_rank(), slurm.global_rank(), slurm.world_size())
    local_rank, rank, world = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))
    return Place(local_rank, rank, max(1, world))


def _cpu_processes() -> int:
    if "LOCAL_WORLD_SIZE" not in os.environ and SLURMEnvironment.detect():
        return int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
