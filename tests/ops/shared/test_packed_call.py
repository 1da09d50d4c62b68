"""C reads what Python packs, and a struct of another size does not compile."""

import ctypes
from typing import NamedTuple

import pytest
import torch

from octavo.ops.shared.call_form import CallForm
from octavo.ops.shared.compile import CompileError, compile_shared, find_compiler
from octavo.ops.shared.packed_call import Loadable, PackedCall
from octavo.ops.shared.resources import resource


class Side(NamedTuple):
    values: torch.Tensor
    scale: torch.Tensor | None = None
    group: int = 1


class Sample(NamedTuple):
    x: torch.Tensor
    left: Side
    factor: float
    right: Side
    causal: bool = True


FORM = CallForm(Sample, nameless=("values",))
FLOATS, CODES = Loadable((torch.float32,), is_dense=True), Loadable((torch.int8, torch.int64))
PACKED = PackedCall(
    FORM,
    ("to", "number"),
    {"x": FLOATS, "left": CODES, "left_scale": FLOATS, "right": CODES, "right_scale": FLOATS},
)
SOURCE = """
EXPORT int sample(const PackedSample *packed) {
    const Sample *call = &packed->call;
    double *to = (double *)packed->to;
    *to++ = packed->number, *to++ = call->factor, *to++ = call->causal, *to++ = call->left.group;
    *to++ = call->right.group, *to++ = call->left.scale.dims, *to++ = ((const float *)call->right.scale.data)[1];
    *to++ = call->left.values.kind == KIND_INT64, *to++ = call->right.values.kind == KIND_INT8;
    for (int i = 0; i < 4; i++) *to++ = call->x.size[i];
    for (int i = 0; i < 4; i++) *to++ = call->x.stride[i];
    return (int)call->x.dims;
}
"""


def compiled(declarations: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_shared("sample", resource("ops/shared/vector.h") + declarations + SOURCE)))


@pytest.fixture(autouse=True)
def compiler() -> None:
    try:
        find_compiler()
    except CompileError as error:
        pytest.skip(str(error))


def test_c_reads_what_python_packs() -> None:
    x = torch.zeros(6, 9)[:2, :3]
    left, right = torch.zeros(1, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int8)
    call = Sample(x, Side(left, group=7), 0.25, Side(right, torch.tensor([1.0, 5.0]), 2**40), causal=False)
    found = torch.zeros(17, dtype=torch.float64)
    packed = PACKED.pack(PACKED.fields(call), found.data_ptr(), -3)
    assert compiled(PACKED.declarations).sample(packed) == x.dim()
    expected = [-3, 0.25, 0, 7, 2**40, -1, 5.0, 1, 1, 1, 1, 2, 3, 0, 0, 9, 1]
    assert found.tolist() == expected


def test_what_a_kernel_does_not_load_is_not_packed() -> None:
    good = Sample(torch.zeros(2, 3), Side(torch.zeros(1).char()), 1.0, Side(torch.zeros(1).char()))
    assert PACKED.fields(good) is not None
    for x in (torch.zeros(2, 3).double(), torch.zeros(3, 2).T, torch.zeros(1, 1, 1, 1, 1), torch.tensor(1.0)):
        assert PACKED.fields(good._replace(x=x)) is None


def test_a_struct_of_another_size_does_not_compile() -> None:
    lacking = PACKED.declarations.replace("    int64_t causal;\n", "")
    assert lacking != PACKED.declarations
    with pytest.raises(CompileError, match="what Python packs"):
        compiled(lacking)
