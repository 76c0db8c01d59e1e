"""Another device on a machine without one: the CPU under the name "elsewhere".

Its tensors are empty shells; the numbers lie in CPU tensors that are looked up by the shell's
storage. As on a real device, an operation on tensors of two devices is an error, unless it copies,
indexes, or one of them is a single number.
"""

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as trees
from torch.utils import backend_registration

NAME = "elsewhere"
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense"}
SHARED = {"aten::detach", "aten::alias"}  # torch makes another shell with the same storage
NUMBERS: dict[int, Tensor] = {}
LIBRARIES: list[torch.library.Library] = []  # what they define is forgotten with them

MODULE = {  # torch.elsewhere, which everybody else is told is not there
    "is_available": lambda: False,
    "manual_seed_all": lambda seed: None,
    "_is_in_bad_fork": lambda: False,
}


@cache
def elsewhere() -> torch.device:
    """The device, made when it is first asked for (or the test is skipped)."""
    begin = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if begin is None:
        pytest.skip("this version of torch cannot be taught another device")
    begin(NAME, backend_module=SimpleNamespace(**MODULE))
    LIBRARIES.extend(torch.library.Library(name, "IMPL") for name in ("_", "aten"))
    LIBRARIES[0].fallback(_run, "PrivateUse1")
    for name in filter(_has_a_kernel_of_its_own, torch._C._dispatch_get_all_op_names()):
        base, _, overload = name.removeprefix("aten::").partition(".")
        operation = getattr(getattr(torch.ops.aten, base), overload or "default", None)
        if operation is not None:
            LIBRARIES[1].impl(name.removeprefix("aten::"), partial(_run, operation), "PrivateUse1")
    return torch.device(NAME, 0)


def _has_a_kernel_of_its_own(name: str) -> bool:
    """Operations that torch would rather do itself, without asking the device."""
    kinds = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return name.startswith("aten::") and name not in SHARED and any(has(name, k) for k in kinds)


def _run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation, on the numbers."""
    name = operation._schema.name
    leaves, form = trees.tree_flatten((args, kwargs))
    if name not in COPIES and "index" not in name:
        _refuse_others(name, leaves)
    numbers = [_numbers(leaf) for leaf in leaves]
    own_args, own_kwargs = trees.tree_unflatten(numbers, form)
    own_kwargs.pop("pin_memory", None)
    if name in ("aten::view", "aten::_unsafe_view"):  # shells are contiguous, numbers need not be
        operation = torch.ops.aten.reshape.default
    with torch.no_grad():
        out = operation(*own_args, **own_kwargs)
    if str(kwargs.get("device", NAME)) == "cpu":
        return out.contiguous()
    if not operation._schema.returns:
        return None
    if name.endswith("_") and not name.endswith("__"):
        if own_args[0].shape != args[0].shape:
            args[0].data = _shell(own_args[0])
        return args[0]
    known = {id(n): leaf for n, leaf in zip(numbers, leaves, strict=True) if _far(leaf)}
    return trees.tree_map(lambda v: known[id(v)] if id(v) in known else _shell(v), out)


def _refuse_others(name: str, leaves: list[Any]) -> None:
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() and not _far(leaf):
            raise RuntimeError(
                f"{name} on {NAME} was given a tensor on {leaf.device}, of shape "
                f"{tuple(leaf.shape)}"
            )


def _far(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _shell(value: Any) -> Any:
    """The empty tensor that stands for these numbers."""
    if not isinstance(value, Tensor):
        return value
    shell = torch._C._acc.create_empty_tensor(value.shape, value.dtype)
    NUMBERS[shell.untyped_storage()._cdata] = value
    return shell


def _numbers(value: Any) -> Any:
    """What stands for a value on the CPU."""
    if _far(value):
        return NUMBERS[value.untyped_storage()._cdata].reshape(value.shape)
    return torch.device("cpu") if isinstance(value, torch.device) else value
