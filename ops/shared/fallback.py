"""Calls that no fast kernel serves: the reference computes them, slower, and here that is said.

    with ops.strict():
        model.generate(...)    # raises where a reference would run

`OCTAVO_KERNELS=strict` in the environment does the same for a whole process.
"""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_IS_STRICT: ContextVar[bool] = ContextVar("octavo_is_strict", default=False)
_LOCK = threading.Lock()
_FELL_BACK: set[tuple[str, str, str]] = set()
_ANNOUNCED: set[str] = set()


@contextmanager
def strict() -> Iterator[None]:
    """Inside, a call that no fast kernel serves raises NotImplementedError instead of running the reference.

    It holds for the thread (or asyncio task) that is inside, and may be nested. A call without `with` does nothing.
    """
    token = _IS_STRICT.set(True)
    try:
        yield
    finally:
        _IS_STRICT.reset(token)


def announced(reason: str) -> None:
    """Let `fell_back` not warn for this reason: the user has been told, or has asked for the references."""
    with _LOCK:
        _ANNOUNCED.add(reason)


def fell_back(op: str, device: str, reason: str | None) -> bool:
    """Whether a call has to take the reference, which is what `reason` says: None if a kernel serves it.

    The first such call of an op on a device for a reason warns; `ops.report()` lists them all.

    Args:
        op: name of the op, as `encode`.
        device: as in `ops.report()`: CPU, CUDA, NPU.
        reason: what `supports` of a kernel gives: why it declines and what would help, without a full stop.

    Raises:
        NotImplementedError: within `strict()`; one line with the reason.
    """
    if reason is None:
        return False
    if _IS_STRICT.get() or os.environ.get("OCTAVO_KERNELS") == "strict":
        raise NotImplementedError(f"{op} on {device} would run as the reference (PyTorch), and it is strict: {reason}")
    call = (op, device, reason)
    if call not in _FELL_BACK:
        with _LOCK:
            is_new = call not in _FELL_BACK
            _FELL_BACK.add(call)
        if is_new and reason not in _ANNOUNCED:
            warnings.warn(
                f"octavo: {op} on {device} runs as the reference (PyTorch), slower: {reason} (octavo.ops.report() "
                "lists such calls, and within octavo.ops.strict() they raise)",
                RuntimeWarning,
                stacklevel=3,
            )
    return True


def calls_fallen_back() -> list[tuple[str, str, str]]:
    """Op, device and reason of all that `fell_back` has seen in this process."""
    with _LOCK:
        return sorted(_FELL_BACK)
