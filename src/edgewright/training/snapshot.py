"""What a checkpoint must hold so that a resumed run gives the same bits, taken from live objects and put back.

Saved: trainable parameters, all persistent buffers, every frozen parameter whose content changed since the run began
(a moving average kept inside the model), optimizer, gradients of an unfinished accumulation, batches, random states,
and the settings that shape the result. Frozen parameters are not copied: a checksum of each makes sure that a resume
starts from the same base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.io.hashing import bit_sum
from edgewright.training.batches import ResumableBatches
from edgewright.training.checkpoint.tree import describe

# Entries of torch's optimizers that have the shape of their parameter.
FULL_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg", "exp_inf", "acc_delta")


def frozen_checksums(model: nn.Module) -> dict[str, int]:
    return {name: bit_sum(p) for name, p in model.named_parameters() if not p.requires_grad}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by name; tied ones once. References, no copies."""
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def changing_tensors(model: nn.Module, frozen: Mapping[str, int]) -> dict[str, Tensor]:
    """The part of `model_tensors` that a checkpoint holds; `frozen` has the checksums from when the run began."""
    return {
        name: tensor
        for name, tensor in model_tensors(model).items()
        if not (isinstance(tensor, nn.Parameter) and not tensor.requires_grad and frozen.get(name) == bit_sum(tensor))
    }


def check_model(
    path: Path, model: nn.Module, saved: set[str], shapes: Mapping[str, str], frozen: Mapping[str, int]
) -> None:
    """Raise UsageError unless `model` has the tensors of the run in `path`, trained and frozen alike, and its base.

    `saved` names the tensors in the checkpoint; the other frozen ones must have the values that the run began with.
    """
    now = {name: describe(tensor) for name, tensor in model_tensors(model).items()}
    for name in sorted(now.keys() | shapes.keys()):
        if now.get(name) != shapes.get(name):
            was, is_now = shapes.get(name, "absent"), now.get(name, "absent")
            raise UsageError(f"cannot resume from {path}: model tensor {name!r} was {was}, now {is_now}")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == (name in frozen):
            was, is_now = ("frozen", "trainable") if parameter.requires_grad else ("trainable", "frozen")
            raise UsageError(f"cannot resume from {path}: model tensor {name!r} was {was}, now it is {is_now}")
        if name in frozen and name not in saved and bit_sum(parameter) != frozen[name]:
            raise UsageError(f"cannot resume from {path}: frozen parameter {name!r} has other values than in that run")


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a resume compares about the optimizer: its class and, for each group, size, rate and decay."""
    groups = [
        {
            "parameters": len(group["params"]),
            "learning_rate": float(group.get("lr", 0.0)),
            "weight_decay": float(group.get("weight_decay", 0.0)),
        }
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__qualname__, "groups": groups}


def option_fits(value: Any, live: Any) -> bool:
    """Whether a saved option of an optimizer can stand where the live one does: a number for a number, a pair for a
    pair, a tensor for one of the same shape.
    """
    if isinstance(value, Tensor) and isinstance(live, Tensor):
        return value.shape == live.shape
    number = (int, float, Tensor)
    if isinstance(live, number) and not isinstance(live, bool):
        return isinstance(value, number) and not isinstance(value, bool)
    if isinstance(live, tuple | list):
        alike = isinstance(value, tuple | list) and len(value) == len(live)
        return alike and all(map(option_fits, value, live))
    return live is None or isinstance(value, type(live))


def state_fits(optimizer: torch.optim.Optimizer, name: str, value: Any, parameter: Tensor) -> bool:
    """Whether an entry of the state of one of torch's optimizers is such as it makes; True for other optimizers."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return True
    if name == "step":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number or (isinstance(value, Tensor) and value.numel() == 1)
    return name not in FULL_STATE or value is None or (isinstance(value, Tensor) and value.shape == parameter.shape)


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
# What torch's optimizers look up in the state of a parameter that has one. SGD does without its momentum.
NEEDED: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.Adam: _MOMENTS,
    torch.optim.AdamW: _MOMENTS,
    torch.optim.RAdam: _MOMENTS,
    torch.optim.NAdam: (*_MOMENTS, "mu_product"),
    torch.optim.Adamax: ("step", "exp_avg", "exp_inf"),
    torch.optim.Adagrad: ("step", "sum"),
    torch.optim.RMSprop: ("step", "square_avg"),
    torch.optim.Adadelta: ("step", "square_avg", "acc_delta"),
}


def missing_state(optimizer: torch.optim.Optimizer, entries: Mapping[str, Any]) -> list[str]:
    """Labels that the saved state of a parameter lacks, so that the next step would fail."""
    return [name for name in NEEDED.get(type(optimizer), ()) if entries and entries.get(name) is None]


def check_optimizer(path: Path, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Raise FormatError unless groups, options and, of torch's optimizers, tensors are such as `optimizer` has."""
    own = optimizer.state_dict()
    if "state" not in own:  # a pair of optimizers, whose state is that of both under their names
        for name, inner in vars(optimizer).items():
            if isinstance(inner, torch.optim.Optimizer) and name in own:
                check_optimizer(path, inner, state[name])
        return
    live, saved = own["param_groups"], state["param_groups"]
    problems = [f"{len(saved)} groups instead of {len(live)}"] if len(live) != len(saved) else []
    for group, old in zip(live, saved, strict=False):
        odd = [name for name, value in old.items() if name != "params" and not option_fits(value, group.get(name))]
        problems += [f"an option {str(name)[:40]!r} of another kind" for name in odd]
        problems += ["no learning rate"] if "lr" in group and "lr" not in old else []
        problems += ["other parameters"] if group["params"] != old["params"] else []
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state["state"].items():
        odd = [name for name, value in entries.items() if not state_fits(optimizer, name, value, parameters[index])]
        problems += [f"{str(name)[:40]!r} of another kind" for name in odd]
        problems += [f"no {name!r}" for name in missing_state(optimizer, entries)]
    if problems:
        raise FormatError(f"checkpoint {path} is damaged: its optimizer has {problems[0]}")


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` that keeps the dtype of every tensor (torch casts state to the parameter's dtype)."""
    optimizer.load_state_dict(state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state.get("state", {}).items():
        for key, saved in entries.items() if isinstance(entries, Mapping) and isinstance(index, int) else ():
            loaded = optimizer.state[parameters[index]].get(key)
            if isinstance(saved, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != saved.dtype:
                optimizer.state[parameters[index]][key] = saved.to(loaded.device)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(path: Path, model: nn.Module, saved: Any) -> None:
    """Raise FormatError unless every saved gradient is that of a parameter of this model."""
    shapes = {name: describe(parameter) for name, parameter in model.named_parameters()}
    for name, gradient in saved.items():
        if (
            name not in shapes
            or not isinstance(gradient, Tensor)
            or tuple(gradient.shape) != tuple(model.get_parameter(name).shape)
        ):
            raise FormatError(f"checkpoint {path} is damaged: it holds no gradient that {name[:80]!r} could have")


def restore_gradients(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put gradients back in the memory layout of their parameters, as autograd would have left them."""
    for name, parameter in model.named_parameters():
        parameter.grad = torch.empty_like(parameter).copy_(saved[name]) if name in saved else None


def batches_state(batches: Any) -> dict[str, Any] | None:
    return batches.state_dict() if isinstance(batches, ResumableBatches) else None


def restore_batches(batches: Any, state: dict[str, Any] | None) -> None:
    if state is None or not isinstance(batches, ResumableBatches):
        raise UsageError(
            f"cannot resume: the batches ({type(batches).__name__}) have no state_dict() and load_state_dict(), so "
            "their position is unknown; use edgewright.training.BlockBatches, or pass resume='never' to start again"
        )
    batches.load_state_dict(state)


def random_state(device: torch.device, generator: torch.Generator | None) -> dict[str, Tensor | None]:
    """States of torch's CPU generator, of the device's and of the caller's own.

    Python's and NumPy's global generators are not in it: what draws from those cannot be resumed.
    """
    return {
        "cpu": torch.get_rng_state(),
        "device": _on_device(device, "get_rng_state") if device.type != "cpu" else None,
        "generator": None if generator is None else generator.get_state(),
    }


def check_random_state(where: object, device: torch.device, state: Any) -> None:
    """Raise FormatError unless `restore_random_state` can take this, whatever generator it is given."""
    try:
        torch.Generator().set_state(state["cpu"])
        if device.type not in ("cpu", "mps") and state["device"] is not None:
            torch.Generator(device).set_state(state["device"])
        if state["generator"] is not None:
            torch.Generator().set_state(state["generator"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise FormatError(f"{where} holds random states that no generator has ({error!r:.160})") from error


def restore_random_state(device: torch.device, generator: torch.Generator | None, state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and state["device"] is not None:
        _on_device(device, "set_rng_state", state["device"])
    if generator is not None:
        if state["generator"] is None:
            raise UsageError("cannot resume: generator was absent, now one is given")
        generator.set_state(state["generator"])


def seed_random_state(device: torch.device, seed: int) -> None:
    """Seed torch's CPU generator and that of `device`, no other."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        _on_device(device, "set_rng_state", torch.Generator(device).manual_seed(seed).get_state())


def _on_device(device: torch.device, function: str, *arguments: Any) -> Any:
    where = () if device.type == "mps" else (device,)  # torch.mps has one device and takes no argument for it
    return getattr(torch.get_device_module(device), function)(*arguments, *where)


@contextmanager
def preserved_random_state(device: torch.device, generator: torch.Generator | None = None) -> Iterator[None]:
    """Whatever is drawn inside, the generators come out as they went in."""
    state = random_state(device, generator)
    try:
        yield
    finally:
        restore_random_state(device, generator, state)


@contextmanager
def preserved_modes(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode inside; each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def first_difference(was: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two JSON trees differ, as (dotted name, was, now)."""
    if isinstance(was, dict) and isinstance(now, dict):
        pairs: Any = ((key, was.get(key, "absent"), now.get(key, "absent")) for key in dict.fromkeys([*was, *now]))
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = ((str(index), *values) for index, values in enumerate(zip(was, now, strict=True)))
    else:
        return None if was == now else (name, was, now)
    found = (first_difference(old, new, f"{name}.{key}" if name else key) for key, old, new in pairs)
    return next((difference for difference in found if difference), None)
