"""Which devices and which precision a run uses."""

import os
import sys
from dataclasses import dataclass

import torch
from pytorch_lightning.plugins.environments import LSFEnvironment, SLURMEnvironment

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
        return Hardware((), precision, _processes_here() or 1)
    launched = _processes_here()
    gpus = tuple(range(min(available, launched or available))) if training.devices is None else training.devices
    if training.devices is None and len(gpus) < available:
        which = f"of this machine's {available} GPUs, as many are used as processes were started on it"
        print(f"notice: {which}: {len(gpus)}", file=sys.stderr)
    absent = [str(index) for index in gpus if index >= available]
    if absent:
        raise InputError(f"--gpus: no GPU {', '.join(absent)}; this machine has 0 to {available - 1}")
    return Hardware(gpus, _gpu_precision() if training.precision == "auto" else training.precision)


def set_up_gpus() -> None:
    """Choose this process's kernels for GPUs: TF32 for products in float32, and no attention of cuDNN's.

    torch takes cuDNN's first on an H100. It makes a plan for every length, so one a decoded token, and gives NaN
    as gradients behind some masks (pytorch's issue 196678). The flash and memory-efficient kernels stay.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class Place:
    """Which of the processes this is."""

    local_rank: int
    """Among those on this machine."""
    rank: int
    world: int


def process_place() -> Place:
    """Return which process this is, as ``torchrun`` or SLURM's ``srun`` say; the only one otherwise."""
    if started_by_slurm():
        slurm = slurm_environment()
        return Place(slurm.local_rank(), slurm.global_rank(), slurm.world_size())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if "RANK" not in os.environ:
        # Lightning's own children know but this, and in their parent it leaves WORLD_SIZE behind.
        return Place(local_rank, 0, 1)
    return Place(local_rank, int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1")))


def started_by_slurm() -> bool:
    """Whether this is a SLURM job's process, not one that ``torchrun`` started within an allocation."""
    return "WORLD_SIZE" not in os.environ and SLURMEnvironment.detect()


def slurm_environment() -> SLURMEnvironment:
    """Return Lightning's view of SLURM's variables; a preempted job is not requeued.

    Raises:
        InputError: Lightning refuses how the job was submitted.
    """
    try:
        # A requeued job would go on from a file of Lightning's own, unasked and past all checks of --resume.
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise InputError(f"SLURM: {' '.join(str(error).split())}") from None


def check_processes_here(hardware: Hardware) -> None:
    """Check that ``torchrun`` or SLURM started as many processes on this machine as the run has devices here.

    Raises:
        InputError: another number; some would train alone, wait for others for ever or share a GPU.
    """
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if started_by_slurm() and tasks != "1" and "SLURM_STEP_NUM_TASKS" not in os.environ:
        raise InputError(
            f"SLURM: the job has {tasks} tasks, but its script started this process itself, once; put srun before "
            "the command"
        )
    here, wanted = _processes_here(), hardware.device_count
    if here is not None and here != wanted:
        devices = f"{wanted} of its GPUs" if hardware.gpus else f"{wanted} on its CPU"
        raise InputError(
            f"{here} processes were started on this machine, but the run uses {devices}; start one a device "
            "(torchrun --nproc-per-node, srun --ntasks-per-node), all of which see all devices, or give --gpus"
        )


def check_machines(hardware: Hardware, training: TrainingConfig) -> None:
    """Check that ``torchrun`` or SLURM started a training's processes on as many machines as ``--num_nodes`` says.

    Raises:
        InputError: another number, or the run was started by hand and does not say where the others are.
    """
    is_told = "MASTER_ADDR" in os.environ or LSFEnvironment.detect()
    if training.num_nodes > 1 and _processes_here() is None and not is_told:
        raise InputError(
            f"--num_nodes {training.num_nodes}: nothing says where the other machines are; start the run on each "
            "with torchrun or with srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    world, here = process_place().world, hardware.device_count
    if _processes_here() is not None and world != here * training.num_nodes:
        raise InputError(
            f"--num_nodes {training.num_nodes}: {world} processes were started, {here} on each machine"
        )


def _gpu_precision() -> str:
    """Return the default on a GPU: older ones have no bfloat16 of their own."""
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def _processes_here() -> int | None:
    """Return how many processes ``torchrun`` or SLURM started on this machine; None if neither did."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if started_by_slurm():
        return int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    return None
