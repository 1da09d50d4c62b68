"""The processes among which a model's heads and channels are shared, one a device: tensor parallelism.

Each holds the share of its rank, see `shares.py`; what they compute together is summed. torch.distributed carries that.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from ...errors import OctavoError, first_line

_OTHER_AXES = ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size")
_START = "start it by torchrun --nproc_per_node=N, which makes N of them"
_ODD = 0x9E3779B97F4A7C15 - 2**64
"""An odd number by whose multiples tokens are told apart, as int64."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that share a model.

    Attributes:
        rank, size: its number, from 0, and how many there are.
        device: that of its share.
    """

    rank: int
    size: int
    device: torch.device

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, the same on each bit for bit."""
        total = part.detach().contiguous()
        distributed.all_reduce(total)
        return total

    def largest(self, part: torch.Tensor) -> torch.Tensor:
        """The largest of each element over all ranks."""
        found = part.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return found

    def check_same(self, ids: torch.Tensor) -> None:
        """Raise an `OctavoError` on all ranks unless each was given the same tokens.

        Args:
            ids: int64 `[B, S]`.
        """
        flat = ids.reshape(-1)
        factors = torch.arange(1, 2 * len(flat) + 1, 2, device=ids.device) * _ODD
        told = torch.stack([((flat + 1) * factors).sum(), torch.tensor(ids.shape[-1], device=ids.device)])
        found = self.largest(torch.cat((told, -told)))
        if not torch.equal(found[:2], -found[2:]):
            raise OctavoError(
                "ranks were given different tokens, and each has a share of one model: give all the same, and where "
                "tokens are sampled, the same seed (torch.manual_seed)"
            )


def _asked_for(arguments: dict[str, Any]) -> tuple[Any, int | None] | None:
    """Take plan and number of ranks out of the arguments of `from_pretrained`; None where neither is there.

    Raises:
        OctavoError: what is asked for is not served.
    """
    plan, size, mesh = (arguments.pop(name, None) for name in ("tp_plan", "tp_size", "device_mesh"))
    config = arguments.pop("distributed_config", None)
    if config is not None:
        fields = config if isinstance(config, dict) else vars(config)
        for name in _OTHER_AXES:
            if (fields.get(name) or 1) > 1:
                raise OctavoError(f"distributed_config: {name}={fields[name]}: ranks share heads and channels only")
        if fields.get("enable_expert_parallel"):
            raise OctavoError(
                "distributed_config: enable_expert_parallel: each rank has a part of every expert instead"
            )
        plan, size = fields.get("tp_plan") or plan, fields.get("tp_size") or size
    if mesh is not None:
        raise OctavoError("device_mesh is not served: all processes share one model; leave it out")
    if plan is None and size in (None, 1):
        return None
    if plan not in (None, "auto"):
        raise OctavoError(f"tp_plan={plan!r}: what ranks hold follows from the architecture; say tp_plan='auto'")
    return plan, size


def _accelerator() -> torch.device | None:
    """The accelerator of this machine; none where torch is built for one that is not there."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _device(backend: str) -> torch.device:
    """The device of this process, of the kind that a backend of torch.distributed serves."""
    accelerator = None if backend == "gloo" else _accelerator()
    if accelerator is None:
        return torch.device("cpu")
    device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
    torch.accelerator.set_device_index(device.index)
    return device


def _join() -> None:
    """Join the processes that torchrun has started.

    Raises:
        OctavoError: it has started none, or they do not find one another.
    """
    if not distributed.is_available() or not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise OctavoError(f"tp_plan: a model is shared among processes, and this one is alone; {_START}")
    kind = _accelerator()
    backend = distributed.get_default_backend_for_device("cpu" if kind is None else kind.type)
    try:
        _device(backend)
        distributed.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        raise OctavoError(f"tp_plan: processes do not find one another ({first_line(error)}); {_START}") from error


def ranks_asked_for(arguments: dict[str, Any]) -> Ranks | None:
    """The ranks that the arguments of `from_pretrained` ask for; None where they ask for none, or for one.

    Args:
        arguments: of transformers: `tp_plan`, `tp_size`, `distributed_config`, which are taken out.

    Raises:
        OctavoError: they ask for what is not served; there are no processes, or others than are asked for.
    """
    asked = _asked_for(arguments)
    if asked is None:
        return None
    if arguments.get("device_map") is not None:
        raise OctavoError("tp_plan and device_map exclude each other: ranks have a device each; leave out device_map")
    if not (distributed.is_available() and distributed.is_initialized()):
        _join()
    size = distributed.get_world_size()
    if asked[1] not in (None, size):
        raise OctavoError(f"tp_size={asked[1]}, and there are {size} processes; leave it out")
    return Ranks(distributed.get_rank(), size, _device(distributed.get_backend())) if size > 1 else None
