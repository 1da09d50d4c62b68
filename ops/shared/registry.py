"""Registration of the ops with `torch.library`, and the record of what runs where.

Every op has one schema and one Python signature. Its `reference.py` is the semantics, the oracle of the tests and the
kernel of every device that has no better one; a device file registers a faster kernel of the same signature.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .fallback import calls_fallen_back, fell_back
from .operands import check_devices

NAMESPACE = "octavo"
"""Namespace of the ops and key of the attention function. A bundle carries its digest here, so that two checkpoints of
different versions live in one process."""

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_KERNELS: dict[tuple[str, str], str | Callable[[], str]] = {}
_SIGNATURES: dict[str, inspect.Signature] = {}
_WAYS: set[tuple[str, str, str]] = set()
_ON_CUDA: dict[Callable, Callable] = {}
"""Kernels by the op that they are of."""


def _is_defined(name: str) -> bool:
    return hasattr(getattr(torch.ops, NAMESPACE), name)


def _on_one_device(fake: Callable) -> Callable:
    """The fake, which also runs where one tensor alone is on the meta device, as after half a load: that is refused."""

    def checked_fake(*args: Any, **kwargs: Any) -> Any:
        check_devices(*[value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)])
        return fake(*args, **kwargs)

    return checked_fake


def _declared(name: str, reference: Callable) -> Callable:
    """The reference as the kernel of devices that have no better one, which `fell_back` hears of."""

    def declared_reference(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        fell_back(name, device.upper(), "Octavo has no kernels for this device")
        return reference(*args, **kwargs)

    return declared_reference


def define(schema: str, reference: Callable, fake: Callable) -> Callable:
    """Define an op by its schema, with the reference as the kernel of every device; return the callable op.

    A second copy of the same code in one process (the same bundle beside two checkpoints) uses the op of the first.
    """
    name = schema.split("(", 1)[0]
    if not _is_defined(name):
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, _declared(name, reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _on_one_device(fake), lib=_LIBRARY)
    _KERNELS[name, "every device"] = "reference (PyTorch)"
    return getattr(getattr(torch.ops, NAMESPACE), name)


def define_op(name: str, reference: Callable, fake: Callable, mutates: tuple[str, ...] = ()) -> Callable:
    """Define an op by the signature of its reference, from which the schema follows; return the callable op.

    Args:
        mutates: names of the arguments that are written.
    """
    _SIGNATURES[name] = inspect.signature(reference)
    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    return define(name + schema.replace("SymInt", "int"), reference, fake)  # in a graph, numbers are constants


def implement(name: str, dispatch_key: str, kernel: Callable, description: str | Callable[[], str]) -> None:
    """Register a kernel for one device (`dispatch_key`: "CPU", "CUDA", "PrivateUse1"), or nothing if one is there.

    `description` is for `report`: a text, or a function that finds out, called when somebody asks.

    Raises:
        TypeError: the kernel is not of the signature of the reference, names and defaults included.
    """
    signature = inspect.signature(kernel)
    if _SIGNATURES.get(name, signature) != signature:
        raise TypeError(f"{kernel.__name__} must be of the signature of {name}, {_SIGNATURES[name]}, not {signature}")
    qualified = f"{NAMESPACE}::{name}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, dispatch_key):
        _LIBRARY.impl(name, kernel, dispatch_key)
    if dispatch_key == "CUDA":
        _ON_CUDA[getattr(getattr(torch.ops, NAMESPACE), name)] = kernel
    _KERNELS[name, dispatch_key] = description


def is_unobserved(x: torch.Tensor) -> bool:
    """Whether nobody listens to torch's dispatcher when an op is called with x: no graph, trace, mode, or vmap."""
    if type(x) is not torch.Tensor or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
        return False
    return torch._C._get_tracing_state() is None and torch._C._functorch.peek_interpreter_stack() is None


def eagerly(op: Callable, x: torch.Tensor, *others: Any, **named: Any) -> Any:
    """A call of an op, on CUDA past torch's dispatcher where nobody listens to it, which takes longer than a launch."""
    if not torch.compiler.is_compiling() and x.is_cuda and op in _ON_CUDA and is_unobserved(x):
        return _ON_CUDA[op](x, *others, **named)
    return op(x, *others, **named)


def describe(name: str, device: str, description: Callable[[], str]) -> None:
    """Let `report` say what serves an op that torch.library does not know."""
    _KERNELS[name, device] = description


def note_way(name: str, device: str, way: str) -> None:
    """Let `report` say which way calls of an op went."""
    _WAYS.add((name, device, way))


def served_by(name: str, device: str) -> str:
    """What serves an op on a device, "CPU", "CUDA" or "NPU", as `report` has it.

    Raises:
        KeyError: there is no such op.
    """
    key = "PrivateUse1" if device == "NPU" else device
    text = _KERNELS.get((name, key)) or _KERNELS[name, "every device"]
    return text if isinstance(text, str) else text()


def report() -> str:
    """A table of what runs: a line per op and device, and one per reason for which calls took another way instead."""
    known = {key: text if isinstance(text, str) else text() for key, text in _KERNELS.items()}
    devices = {"PrivateUse1": "NPU"}
    rows = [
        ("op", "device", "kernel"),
        *((name, devices.get(key, key), text) for (name, key), text in sorted(known.items())),
        *((name, device, f"has run as reference (PyTorch): {text}") for name, device, text in calls_fallen_back()),
        *sorted(_WAYS),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {key:<{widths[1]}}  {text}" for name, key, text in rows)
