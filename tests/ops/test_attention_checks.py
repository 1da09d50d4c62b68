"""The C kernel refuses the shapes that `check_call` refuses, and no others."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from octavo.ops.attention.arguments import check_call
from octavo.ops.attention.call import ATTENTION_CALL, AttentionCall
from octavo.ops.attention.cpu import ATTENTION_KERNEL, PACKED_ATTENTION

from .attention_calls import add_positions, call_of, mask_of, part_of

NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 2**63 - 1)


def whole_call(kind: torch.dtype, form: str, batch: int) -> dict[str, Any]:
    """A call that gives every argument."""
    call = add_positions(call_of(kind, kind, queries=3, keys=40, batch=batch), 16)
    call.key_group, call.value_group = (4, 3) if "tokens" in form else (1, 1)
    for side, codes, group in (("key", call.key, call.key_group), ("value", call.value, call.value_group)):
        for name in ("scale", "zero"):
            setattr(call, f"{side}_{name}", part_of(form, call, codes, group, is_zero=name == "zero"))
    call.mask, call.length = mask_of("bool per head", call), torch.tensor([30] * batch)
    call.query_scale, call.window = torch.ones(6, 1, 1), 5
    return vars(call)


def resized(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A dimension longer, shorter, 1, empty, missing or more, or two exchanged; dense in the last."""
    yield tensor[None]
    yield tensor.flatten()
    for dim, size in enumerate(tensor.shape):
        for count in {0, 1, size - 1, size}:
            yield tensor.narrow(dim, 0, count).contiguous()
        yield torch.cat((tensor, tensor), dim)
        yield tensor.select(dim, 0).contiguous()
        yield tensor.transpose(0, dim).contiguous()


def changed(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield arguments
    for name, value in arguments.items():
        others: list[Any] = [None] if name not in ("query", "key", "value") and isinstance(value, torch.Tensor) else []
        if isinstance(value, torch.Tensor):
            others += list(resized(value))
        elif type(value) is int:
            others += NUMBERS
        for other in others:
            yield {**arguments, name: other}


def is_refused_by_c(call: AttentionCall) -> bool:
    fields = PACKED_ATTENTION.fields(call)
    if fields is None:
        return True
    output, lse = torch.empty(2**16), torch.empty(2**14)
    return (
        ATTENTION_KERNEL.load()["attention"](PACKED_ATTENTION.pack(fields, output.data_ptr(), lse.data_ptr(), 1)) == 2
    )


def is_refused_by_python(call: AttentionCall) -> bool:
    try:
        check_call(call)
    except ValueError:
        return True
    return call.query.numel() == 0 or call.key.codes.shape[2] == 0


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", ["per channel", "per head", "per token", "per channel and group of tokens"])
@pytest.mark.parametrize("kind", [torch.int8, torch.uint8])
def test_c_and_python_refuse_the_same_shapes(kind: torch.dtype, form: str, batch: int) -> None:
    if not ATTENTION_KERNEL.load():
        pytest.skip(f"no C kernel: {ATTENTION_KERNEL.failure}")
    found = []
    for arguments in changed(whole_call(kind, form, batch)):
        call = ATTENTION_CALL.of(**arguments)
        found.append(is_refused_by_python(call))
        assert is_refused_by_c(call) == found[-1], [(name, getattr(x, "shape", x)) for name, x in arguments.items()]
    assert not found[0] and found.count(True) > 100 and found.count(False) > 20
