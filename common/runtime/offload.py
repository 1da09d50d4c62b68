"""Models that accelerate has spread over devices, by `device_map`: parts that lie elsewhere until they are used."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec

from torch import nn

from ..errors import OctavoError


def check_device_map(device_map: object) -> None:
    """Raise an `OctavoError` if there is a device_map, and accelerate is missing, which does what it says."""
    if device_map is not None and find_spec("accelerate") is None:
        raise OctavoError("device_map needs accelerate, which is not installed: pip install accelerate")


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate takes the buffers of a module away after each use, so that nothing is to be made of them."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # several in sequence
    return any(getattr(part, "offload", False) and getattr(part, "offload_buffers", False) for part in hooks)


def check_tied(model: nn.Module) -> None:
    """Raise an `OctavoError` if a last linear is an embedding in codes that is taken away between its own uses."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "embedding", None), nn.Module) and is_offloaded(module.embedding):
            raise OctavoError(
                f"device_map: {name} is the embedding as well, in codes that are not in memory when it is used: give "
                "the embedding a device, or leave out offload_buffers"
            )


@contextmanager
def in_memory(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, those of some modules whose buffers lie elsewhere have them where they run."""
    with ExitStack() as stack:
        for module in modules:
            if is_offloaded(module) and any(part.is_meta for part in module.buffers(recurse=False)):
                stack.enter_context(import_module("accelerate.utils").align_module_device(module))
        yield
