"""The devices of this process: what a user may call one, and carrying a tensor to one with its gradient."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Device = str | int | torch.device


def local_devices(devices: Iterable[Device]) -> list[torch.device]:
    """Each name as the device that tensors of this process report: "cuda" gets its number, "cpu:1" loses it.

    An int is an accelerator's number, as in torch. One device may be named several times.
    Raises TypeError for a bare device, ValueError for no device or for one that this process cannot use.
    """
    if isinstance(devices, str | int | torch.device):
        raise TypeError(f"devices must be a list of devices, such as [{devices!r}]; got {devices!r} itself")
    places = [_local_device(device) for device in devices]
    if not places:
        raise ValueError("devices is empty: name at least one, for example ['cpu', 'cpu']")
    return places


def _local_device(name: Device) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu"]
    if accelerator is not None:
        here += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    device = _parsed(name, accelerator)
    if device is not None and device.type == "cpu":
        return torch.device("cpu")  # every number is the same memory, and tensors there report none
    if device is not None and accelerator is not None and device.type == accelerator.type:
        index = torch.accelerator.current_device_index() if device.index is None else device.index
        device = torch.device(device.type, index)
    if device is None or str(device) not in here:
        raise ValueError(f"unknown device {name!r}: this process has {', '.join(here)}")
    return device


def _parsed(name: Device, accelerator: torch.device | None) -> torch.device | None:
    if isinstance(name, int):
        return torch.device(accelerator.type, name) if accelerator is not None and name >= 0 else None
    try:
        return torch.device(name)
    except RuntimeError:  # torch's own text lists device types that this process does not have
        return None


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor itself where it lies on the device, else a copy there; gradients come back."""
    return tensor if tensor.device == device else copied(tensor, device)


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device in memory of its own, same dtype and memory format; gradients come back."""
    if tensor.device == device:
        return tensor.clone()
    return _Crossing.apply(tensor, device)  # pyright: ignore[reportReturnType]


class _Crossing(torch.autograd.Function):
    """A copy to another device. `Tensor.to` would do, but its gradient fails on a sparse one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.home = tensor.device
        return tensor.to(device, non_blocking=True, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (grad,) = grads
        return _Crossing.apply(grad, ctx.home), None  # pyright: ignore[reportReturnType]
