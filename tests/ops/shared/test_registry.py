"""An op is defined once, by its reference: the schema follows from it, and kernels of other signatures are refused."""

import pytest
import torch

from octavo import ops
from octavo.ops.shared import registry


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered here is in no report of others."""
    for name in ("_KERNELS", "_SIGNATURES"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


def scaled_reference(x: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor, times: int = 1) -> None:
    out.copy_(x * times if scale is None else x * scale * times)


def other_order(scale: torch.Tensor | None, x: torch.Tensor, out: torch.Tensor, times: int = 1) -> None: ...
def other_name(x: torch.Tensor, scales: torch.Tensor | None, out: torch.Tensor, times: int = 1) -> None: ...
def other_default(x: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor, times: int = 2) -> None: ...
def other_type(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, times: int = 1) -> None: ...
def other_result(x: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor, times: int = 1) -> int: ...


def test_the_schema_is_that_of_the_reference() -> None:
    name = "scaled_in_a_test"
    scaled = registry.define_op(name, scaled_reference, lambda *unused: None, mutates=("out",))
    assert str(scaled.default._schema) == (
        f"{registry.NAMESPACE}::{name}(Tensor x, Tensor? scale, Tensor(a2!) out, int times=1) -> ()"
    )
    registry.implement(name, "CPU", scaled_reference, "PyTorch")
    out = torch.empty(3)
    scaled(torch.ones(3), None, out, 5)
    assert out.tolist() == [5, 5, 5]
    for kernel in (other_order, other_name, other_default, other_type, other_result):
        with pytest.raises(TypeError, match=f"{kernel.__name__} must be of the signature of {name}"):
            registry.implement(name, "CUDA", kernel, "not registered")
    assert not [line for line in ops.report().splitlines() if line.startswith(f"{name} ") and "CUDA" in line]


def test_what_is_written_is_said_in_the_schema() -> None:
    written = {
        op: {argument.name for argument in getattr(ops, op).default._schema.arguments if argument.is_write}
        for op in ("encode", "encode_token", "decode", "linear_w8a8")
    }
    assert written == {
        "encode": {"codes"},
        "encode_token": {"codes", "scale", "zero"},
        "decode": set(),
        "linear_w8a8": set(),
    }
