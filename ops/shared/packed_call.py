"""A call as a C kernel takes it: one struct, whose declaration in C and whose packing follow from its definition.

Each tensor is an `Operand`: its address, element type, and sizes and strides of four dimensions, of which those that it
lacks are 1 and 0. Numbers are int64_t, or double. The C source that works with it gets the declarations put in front,
with the size that Python packs, so that a difference does not compile.
"""

import struct
import typing
from operator import attrgetter
from typing import NamedTuple

import torch

from .call_form import CallForm, is_call_part
from .operands import KINDS, dtype_name

OPERAND_KINDS = {**KINDS, torch.bool: 7, torch.int32: 8, torch.int64: 9}
"""Element types by number; those that vector.h does not know are declared with the struct."""
OPERAND = "typedef struct {\n    int64_t data, kind, dims, size[4], stride[4];\n} Operand;\n"
"""`dims` -1 of a tensor that there is not, and all else 0. Strides count elements."""
_ABSENT = (0, 0, -1, *(0,) * 8)
_MORE = tuple(((1,) * (4 - dims), (0,) * (4 - dims)) for dims in range(5))
"""Sizes and strides of the dimensions that a tensor lacks."""


class Loadable(NamedTuple):
    """What a kernel loads as it is.

    Attributes:
        dtypes: element types.
        is_dense: whether neighbours in the last dimension have to be neighbours in memory.
    """

    dtypes: tuple[torch.dtype, ...]
    is_dense: bool = False


def _declared_struct(definition: type, declared: list[str]) -> str:
    """The C type of a NamedTuple, whose declaration and those of its parts are added to `declared`."""
    lines = []
    for field, annotation in typing.get_type_hints(definition).items():
        if is_call_part(annotation):
            kind = _declared_struct(annotation, declared)
        else:
            kind = {float: "double", int: "int64_t", bool: "int64_t"}.get(annotation, "Operand")
        lines.append(f"    {kind} {field};\n")
    text = f"typedef struct {{\n{''.join(lines)}}} {definition.__name__};\n"
    if text not in declared:
        declared.append(text)
    return definition.__name__


class PackedCall:
    """How calls of a form are packed.

    Args:
        form: of the calls.
        results: names of int64_t behind the call: where results go, and whatever else a kernel is told.
        loadable: what the kernel loads, by the names of flat arguments; of each that is a tensor.

    Attributes:
        parts: C source, one declaration each, to be put in front of the kernel's; the struct is called `Packed...` and
            then as the definition of the call, which is its first field.
    """

    def __init__(self, form: CallForm, results: tuple[str, ...], loadable: dict[str, Loadable]) -> None:
        self._values = attrgetter(*[leaf.place for leaf in form.leaves])
        self._kinds = tuple([
            ({dtype: OPERAND_KINDS[dtype] for dtype in loadable[leaf.name].dtypes}, loadable[leaf.name].is_dense)
            if leaf.is_tensor else (None, False)
            for leaf in form.leaves
        ])  # fmt: skip
        formats = ["11q" if leaf.is_tensor else "d" if leaf.annotation is float else "q" for leaf in form.leaves]
        self._struct = struct.Struct("".join(formats) + "q" * len(results))
        self.parts = self._declared(form.definition, results)

    def _declared(self, definition: type, results: tuple[str, ...]) -> list[str]:
        more = {dtype: kind for dtype, kind in OPERAND_KINDS.items() if dtype not in KINDS}
        others = [f"KIND_{dtype_name(dtype).upper()} = {kind}" for dtype, kind in more.items()]
        declared = [f"enum {{ {', '.join(others)} }};\n", OPERAND]
        call = _declared_struct(definition, declared)
        declared.append(f"typedef struct {{\n    {call} call;\n    int64_t {', '.join(results)};\n}} Packed{call};\n")
        declared.append(f'_Static_assert(sizeof(Packed{call}) == {self._struct.size}, "what Python packs");\n')
        return declared

    @property
    def declarations(self) -> str:
        """All of them."""
        return "".join(self.parts)

    def fields(self, call: tuple) -> list[int | float] | None:
        """What is packed of a call; None if a tensor is none that the kernel loads, or has more than four dimensions.

        Nothing else is checked.
        """
        fields: list[int | float] = []
        for value, (kinds, is_dense) in zip(self._values(call), self._kinds, strict=True):
            if value is None:
                fields += _ABSENT
            elif kinds is None:
                fields.append(value)
            else:
                kind, shape, strides = kinds.get(value.dtype), value.shape, value.stride()
                dims = len(shape)
                if kind is None or dims > 4 or (is_dense and strides[-1:] != (1,)):
                    return None
                sizes, steps = _MORE[dims]
                fields += (value.data_ptr(), kind, dims, *sizes, *shape, *steps, *strides)
        return fields

    def pack(self, fields: list[int | float], *results: int) -> bytes:
        """The struct of a call, whose tensors must live until it has been read."""
        return self._struct.pack(*fields, *results)


def joined_declarations(*calls: PackedCall) -> str:
    """The declarations of several, each of them once."""
    return "".join(dict.fromkeys([part for call in calls for part in call.parts]))
