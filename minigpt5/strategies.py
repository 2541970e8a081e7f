"""How several devices share a training run: ``--strategy``.

``ddp`` keeps the whole model on every device and exchanges gradients. ``fsdp`` does the same for what trains, and
shares out the frozen layers of the language model, 70 % of all parameters: each device keeps its share of a layer,
and a layer is put together while it runs.

Lightning's own ``FSDPStrategy`` does not fit this model: it flattens float32 and bfloat16 parameters together,
trainable and frozen ones, and takes over matrices that are read outside a forward pass (embedding, output head).
Only the language model's layers are shared out, because every process runs them equally often whatever its batch
holds; a process without a picture calls neither the vision encoder nor the UNet, and the others would wait for it.
"""

import importlib.util

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from minigpt4.errors import InputError
from minigpt5.config import RunConfig
from minigpt5.hardware import Hardware
from minigpt5.model import MiniGPT5

SHARDED = "fsdp"


def check_strategy(config: RunConfig) -> None:
    """Check that the configured strategy fits this model, on whatever machine.

    Raises:
        InputError: it does not.
    """
    name = config.training.strategy
    if name == SHARDED and config.model.backbone.language_model.quantization != "none":
        raise InputError(
            "--strategy fsdp: cannot share out quantized layers; take --strategy ddp, or "
            "model.backbone.language_model.quantization=none"
        )
    if name.startswith(SHARDED) and name != SHARDED:
        raise InputError(f"--strategy {name}: does not fit this model, whose weights are mostly frozen; take fsdp")


def choose_strategy(config: RunConfig, hardware: Hardware) -> str:
    """Return the name of Lightning's strategy for the configured one.

    Raises:
        InputError: a package or a GPU that it needs is missing, or it does not fit this model.
    """
    check_strategy(config)
    name = config.training.strategy
    if name in (SHARDED, "ddp"):  # one device has nothing to share
        return "ddp" if hardware.device_count * config.training.num_nodes > 1 else "auto"
    if name.startswith("deepspeed"):
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError(
                f"--strategy {name}: the package is not installed; run: pip install deepspeed, or take fsdp"
            )
        if not hardware.gpus:
            raise InputError(f"--strategy {name}: needs a GPU, and this machine has none; take ddp or fsdp")
    return name


def shard_frozen(model: MiniGPT5, wrapped: torch.nn.Module) -> None:
    """Share out the language model's frozen layers among all processes, whose group must exist.

    Args:
        model: its trainable parameters stay whole on every process.
        wrapped: the module around it that ``DistributedDataParallel`` will be given; it leaves the shared-out
            parameters alone.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    layers = model.backbone.language_model.model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trainable)
    shared = {id(parameter) for parameter in layers.parameters() if not parameter.requires_grad}
    # One root over all layers: each would be one of its own, with its own stream and memory for what it gathers.
    whole = {parameter for parameter in model.parameters() if id(parameter) not in shared}
    fully_shard(model.backbone.language_model.model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    names = [name for name, parameter in wrapped.named_parameters() if id(parameter) in shared]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapped, names)


def is_sharded(model: MiniGPT5) -> bool:
    """Return whether running the model needs all processes at once."""
    return hasattr(model.backbone.language_model.model.layers[0], "unshard")
