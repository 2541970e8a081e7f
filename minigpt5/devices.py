"""Devices by name, for commands that compute on one."""

import torch

from minigpt4.errors import InputError

AUTO = "auto"


def open_device(name: str, flag: str) -> torch.device:
    """Return a device that can hold a tensor.

    Args:
        name: as torch names it; ``auto`` takes the GPU if there is one, else the CPU.
        flag: named in the message.

    Raises:
        InputError: there is none of that name here.
    """
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{flag}: {name!r} cannot be used here ({reason}); give auto or cpu") from None
