"""A double of the ops of torch_npu that Octavo calls, for machines without an NPU.

`TorchNpu` stands in for the module: each call goes through torch's own parser against the schema string found in the
libraries of the torch_npu wheel, then through a model of what the documents say (`npu_models.py`), and the result is
compared with what the wheel's own shape function says on meta tensors.
"""

import ast
import functools
import hashlib
import math
import os
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.ops.shared.registry import NAMESPACE

from .npu_models import DTYPE_CODES, MODELS

WHEEL = "torch_npu-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"
WHEEL_SHA256 = "0deb809cf447d3fce636ccfdc9c9f874950f1fe76f18f4aaab31e2d345f7dac0"
DOWNLOAD = "download torch-npu==2.13.0 --no-deps --only-binary=:all: --python-version 3.11 --platform"
NPU_LIBRARY, ATB_LIBRARY = "torch_npu/lib/libtorch_npu.so", "torch_npu/lib/libop_plugin_atb.so"
META_MODULE = "torch_npu/op_plugin/meta/_meta_registrations.py"
OPS = {
    "npu_quantize": NPU_LIBRARY,
    "npu_dynamic_quant": NPU_LIBRARY,
    "npu_dynamic_quant_asymmetric": NPU_LIBRARY,
    "scatter_update_": NPU_LIBRARY,
    "npu_quant_matmul": NPU_LIBRARY,
    "npu_weight_quant_batchmatmul": NPU_LIBRARY,
    "npu_convert_weight_to_int4pack": NPU_LIBRARY,
    "npu_fused_infer_attention_score": NPU_LIBRARY,
    "_npu_paged_attention_quant": ATB_LIBRARY,
}


@functools.cache
def _download(wheel: Path) -> str:
    """Have pip put the wheel where it belongs; its last words if it cannot."""
    wheel.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", *DOWNLOAD.split(), "manylinux_2_28_x86_64", "--dest", str(wheel.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if wheel.exists() else (done.stderr.strip().splitlines() or ["no file"])[-1]


def fetch_wheel() -> Path:
    """The wheel of torch_npu, 42 MB, downloaded once; read, never installed or imported.

    Skips the test where pip cannot get it.
    """
    wheel = Path(os.environ.get("OCTAVO_CACHE") or "~/.cache/octavo").expanduser() / "wheels" / WHEEL
    if not wheel.exists() and (reason := _download(wheel)):
        pytest.skip(f"pip cannot download torch-npu==2.13.0, whose schemas this test reads: {reason}")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == WHEEL_SHA256, f"{wheel} is not what PyPI has; delete it"
    return wheel


@functools.cache
def read_schemas(wheel: Path) -> dict[str, str]:
    """The schema that each op is registered with: the one string in its library that torch's parser accepts."""
    schemas = {}
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in set(OPS.values())}
    for op, library in OPS.items():
        found = re.findall(rb"\0(" + op.encode() + rb"\([^\0]*\) -> [^\0]*)(?=\0)", contents[library])
        accepted = set()
        for text in {match.decode() for match in found}:
            try:
                torch._C.parse_schema(text)
            except RuntimeError:  # a text of a message, in C++ types
                continue
            accepted.add(text)
        assert len(accepted) == 1, f"{op}: {accepted}"
        schemas[op] = accepted.pop()
    return schemas


def read_shape_functions(wheel: Path) -> dict[str, Callable]:
    """The shape functions that the wheel registers for its ops, which also check dtypes, taken out of their module."""
    with zipfile.ZipFile(wheel) as archive:
        module = ast.parse(archive.read(META_MODULE))
    codes = types.SimpleNamespace(
        int4=285, float4_e2m1fn_x2=296, float4_e1m2fn_x2=297, hifloat8=290, float8_e8m0fnu=293
    )
    names = types.SimpleNamespace(VALUE="", TYPE="", PARAM="", NOT_SUPPORT="")
    scope: dict[str, Any] = {"torch": torch, "torch_npu": codes, "math": math, "ErrCode": names, "ops_error": str}
    registered = {}
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "impl":
                    registered[ast.literal_eval(decorator.args[1])] = node.name
            node.decorator_list = []
    kept = [node for node in module.body if isinstance(node, (ast.FunctionDef, ast.Assign))]
    kept = [node for node in kept if not ast.unparse(node).startswith(("m = ", "m_aten = "))]
    exec(compile(ast.Module(kept, []), META_MODULE, "exec"), scope)
    return {op: scope[registered[op]] for op in OPS if op in registered}


class TorchNpu(types.ModuleType):
    """The module `torch_npu` as a double; `calls` records `(op, arguments)`, each call with all of its arguments."""

    def __init__(self, schemas: dict[str, str], shape_functions: dict[str, Callable]) -> None:
        super().__init__("torch_npu")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._library = torch.library.Library("octavo_npu_double", "FRAGMENT")
        for op, schema in schemas.items():
            if not hasattr(torch.ops.octavo_npu_double, op):
                self._library.define(schema)
                self._library.impl(op, MODELS[op], "CompositeExplicitAutograd")
            setattr(self, op, self._recorded(op, torch._C.parse_schema(schema), shape_functions.get(op)))

    def _recorded(self, op: str, schema: Any, shape_function: Callable | None) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = getattr(torch.ops.octavo_npu_double, op)(*args, **kwargs)
            names = [argument.name for argument in schema.arguments]
            self.calls.append((op, {**dict(zip(names, args, strict=False)), **kwargs}))
            if shape_function is not None:
                expected = shape_function(*map(_to_meta, args), **{name: _to_meta(x) for name, x in kwargs.items()})
                for one, other in zip(_tuple(result), _tuple(expected), strict=True):
                    assert (one.shape, one.dtype) == (other.shape, other.dtype), op
            return result

        return call

    def ops(self) -> list[str]:
        """Names of the ops called, in order."""
        return [op for op, _ in self.calls]


def _to_meta(argument: Any) -> Any:
    if isinstance(argument, torch.dtype):
        return DTYPE_CODES[argument]
    return argument.to("meta") if isinstance(argument, torch.Tensor) else argument


def _tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@functools.cache
def torch_npu_double() -> TorchNpu:
    """The double, made once per session; skips the test where the wheel cannot be had."""
    wheel = fetch_wheel()
    return TorchNpu(read_schemas(wheel), read_shape_functions(wheel))


def installed_double(monkeypatch: pytest.MonkeyPatch) -> TorchNpu:
    """The double as what `import torch_npu` finds, for the length of a test."""
    double = torch_npu_double()
    double.calls.clear()
    monkeypatch.setitem(sys.modules, "torch_npu", double)
    return double


NPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)


def on_npu(op: Any, *arguments: Any, **named: Any) -> Any:
    """Run an op of Octavo by the kernel that is registered for NPUs, whatever device its tensors are on."""
    return op.default.redispatch(NPU_KEYS, *arguments, **named)


class EverythingOnNpu(TorchDispatchMode):
    """Inside this context all ops of Octavo run by the kernels that are registered for NPUs."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == NAMESPACE:
            return func.redispatch(NPU_KEYS, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
