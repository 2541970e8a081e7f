"""A GPU for machines that have none: its tensors say that they are elsewhere, and compute on the CPU.

What a real one refuses is refused: an operation on tensors of both places, and NumPy. It borrows the name of
torch's ``lazy`` device, which nothing else uses and whose backward passes run where the CPU's do. Of CUDA itself
it knows nothing: neither autocast nor the fused optimizer, streams or kernels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy")
_MOVES = ("aten::to", "aten::_to_copy", "aten::copy_")
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class FarTensor(Tensor):
    """A tensor of the pretended GPU; ``near`` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "FarTensor":
        far = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _compute(operation, args, kwargs or {})

    def __getitem__(self, index: Any) -> Tensor:
        """Index by a list as by a CPU tensor; torch would ask the device's own allocator for one."""
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be saved as what a checkpoint's reader gets, to which nothing but the values matters."""
        return self.near.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        """Return the values, as a GPU's tensor does by way of the CPU."""
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        """Refuse, as a GPU's tensor does."""
        raise TypeError("can't convert a tensor of a device to numpy; use Tensor.cpu() first")


class _Operations(TorchDispatchMode):
    """Gives operations on CPU tensors a device to make tensors on and to move them to."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _compute(operation, args, kwargs or {})


class _MadeFromLists(TorchFunctionMode):
    """Makes tensors from Python's values, which torch would write into the device's memory itself."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and _is_far(kwargs.get("device")):
            return function(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        return function(*args, **kwargs)


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Let there be a device, and return it."""
    with _Operations(), _MadeFromLists():
        yield DEVICE


def _is_far(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _compute(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values; results go where it was told to put them, else where its tensors are."""
    name, leaves = operation._schema.name, tree_leaves((args, kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    is_far = any(isinstance(tensor, FarTensor) for tensor in given)
    if is_far:
        _refuse_two_places(name, args, given)
    for device in (leaf for leaf in leaves if isinstance(leaf, torch.device)):
        is_far = _is_far(device)
    with _disable_current_modes():
        results = operation(*tree_map(_bring_near, args), **tree_map(_bring_near, kwargs))
    known = {id(_bring_near(tensor)): tensor for tensor in given}

    def put_back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        same = known.get(id(value))
        if same is None:
            return FarTensor(value) if is_far else value
        if name != "aten::to" or isinstance(same, FarTensor) == is_far:
            return same  # changed in place, or where it was to go already
        return FarTensor(value.clone()) if is_far else value.clone()

    return tree_map(put_back, results)


def _refuse_two_places(name: str, args: tuple[Any, ...], given: Sequence[Tensor]) -> None:
    if name in _MOVES:
        return
    # A single number and the indices of a device's tensor may come from the CPU.
    free = tree_leaves(args[1]) if name in _INDEXED and isinstance(args[0], FarTensor) else []
    near = [tensor for tensor in given if not isinstance(tensor, FarTensor) and tensor.ndim]
    if any(all(tensor is not index for index in free) for tensor in near):
        places = ", ".join(f"{tuple(tensor.shape)} on {tensor.device.type}" for tensor in given)
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {places}")


def _bring_near(value: Any) -> Any:
    if isinstance(value, FarTensor):
        return value.near
    return torch.device("cpu") if isinstance(value, torch.device) and _is_far(value) else value
