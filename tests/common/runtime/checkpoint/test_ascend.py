"""Ascend's format: what msmodelslim 26.1 writes, tensor by tensor, and directories that msmodelslim wrote.

The tables were taken from runs of msmodelslim 26.1.0 (PyPI, v0 API) on a 3-layer Llama with w_bit = a_bit = 8 or 16.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional

from octavo.common.convert.api import main
from octavo.common.errors import OctavoError
from octavo.common.runtime.checkpoint.ascend import (
    check_description,
    described_scheme,
    quantized_linears,
    weight_file_names,
)
from octavo.common.runtime.checkpoint.files import read_headers
from octavo.common.runtime.passes import whole_passes
from octavo.models.llama3 import ARCHITECTURE
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ....metrics import rmse_in_std
from ....support import convert_flags, random_ids, save_source, tiny_config, tiny_llama
from ....tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, INNER, Q, KV, VOCABULARY = 64, 128, 64, 32, 320
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# name within a module, label, dtype (model = that of the model), shape ("out", "in": of the linear)
W8A8_LINEAR = [
    ("weight", "W8A8", "I8", ("out", "in")),
    ("bias", "FLOAT", "model", ("out",)),
    ("weight_scale", "W8A8", "F32", ("out", 1)),
    ("weight_offset", "W8A8", "F32", ("out", 1)),
    ("input_scale", "W8A8", "F32", (1,)),
    ("input_offset", "W8A8", "F32", (1,)),
    ("quant_bias", "W8A8", "I32", ("out",)),
    ("deq_scale", "W8A8", "F32, or I64 for fp16", ("out",)),
]
FLOAT_LINEAR = [("weight", "FLOAT", "model", ("out", "in")), ("bias", "FLOAT", "model", ("out",))]
C8_PROJECTION = [("kv_cache_scale", "C8", "F32", ("out",)), ("kv_cache_offset", "C8", "F32", ("out",))]
FA_ATTENTION = [
    ("fa_q.scale", "FAQuant", "F32", (4, 1)),
    ("fa_k.scale", "FAQuant", "F32", (2, 1)),
    ("fa_v.scale", "FAQuant", "F32", (2, 1)),
    ("fa_q.offset", "FAQuant", "I8", (4, 1)),
    ("fa_k.offset", "FAQuant", "I8", (2, 1)),
    ("fa_v.offset", "FAQuant", "I8", (2, 1)),
]
LINEARS = [
    ("self_attn.q_proj", Q, HIDDEN),
    ("self_attn.k_proj", KV, HIDDEN),
    ("self_attn.v_proj", KV, HIDDEN),
    ("self_attn.o_proj", HIDDEN, Q),
    ("mlp.gate_proj", INNER, HIDDEN),
    ("mlp.up_proj", INNER, HIDDEN),
    ("mlp.down_proj", HIDDEN, INNER),
]

Row = tuple[str, str, str, tuple[int, ...]]


def expected_rows(attention: str, w8a8: bool, dtype: str, biases: tuple[str, ...] = ()) -> list[Row]:
    """Name, label, dtype and shape of every tensor, in the order of the file's description."""
    model = FLOATS[dtype]
    deq_scale = "I64" if dtype == "float16" else "F32"

    def linear(name: str, rows: list, out: int, into: int, has_bias: bool) -> list[Row]:
        dtypes = {"model": model, "F32, or I64 for fp16": deq_scale}
        sizes = {"out": out, "in": into}
        return [
            (f"{name}.{part}", label, dtypes.get(kind, kind), tuple(sizes.get(size, size) for size in shape))
            for part, label, kind, shape in rows
            if part != "bias" or has_bias
        ]

    rows: list[Row] = [("model.embed_tokens.weight", "FLOAT", model, (VOCABULARY, HIDDEN))]
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        if attention == "FAQuant":
            rows += [(f"{prefix}.self_attn.{part}", *facts) for part, *facts in FA_ATTENTION]
        for name, out, into in LINEARS:
            quantized = w8a8 and name != "mlp.down_proj"
            table = W8A8_LINEAR if quantized else FLOAT_LINEAR
            if attention == "C8" and name in ("self_attn.k_proj", "self_attn.v_proj"):
                table = C8_PROJECTION + table
            rows += linear(f"{prefix}.{name}", table, out, into, any(name.startswith(part) for part in biases))
        rows += [
            (f"{prefix}.{norm}_layernorm.weight", "FLOAT", model, (HIDDEN,)) for norm in ("input", "post_attention")
        ]
    return [
        *rows,
        ("model.norm.weight", "FLOAT", model, (HIDDEN,)),
        ("lm_head.weight", "FLOAT", model, (VOCABULARY, HIDDEN)),
    ]


HEADERS = {
    ("C8", True): {"version": "1.0.0", "model_quant_type": "W8A8", "kv_cache_type": "C8", "kv_quant_type": "C8"},
    ("C8", False): {"version": "1.0.0", "model_quant_type": "FLOAT", "kv_cache_type": "C8", "kv_quant_type": "C8"},
    ("FAQuant", True): {"version": "1.0.0", "model_quant_type": "W8A8", "fa_quant_type": "FAQuant"},
    ("FAQuant", False): {"version": "1.0.0", "model_quant_type": "FLOAT", "fa_quant_type": "FAQuant"},
    ("", True): {"version": "1.0.0", "model_quant_type": "W8A8"},
}
FLAGS = {
    "C8": ("--use_kvcache_quant", "True"),
    "FAQuant": ("--use_fa_quant", "True"),
    "": (),
    True: (),
    False: ("--w_bit", "16", "--a_bit", "16"),
}


def stored_order(file: Path) -> list[str]:
    """Names of the tensors of a safetensors file in the order of its header, and of its data."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return list(header)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("attention", "w8a8"), HEADERS, ids=[f"{a or 'no'}-{'w8a8' if w else 'float'}" for a, w in HEADERS]
)
def test_files_are_those_of_msmodelslim(attention: str, w8a8: bool, dtype: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", tiny_llama().to(getattr(torch, dtype)))
    target = tmp_path / "out"
    assert main(ARCHITECTURE, convert_flags(source, target, *FLAGS[attention], *FLAGS[w8a8])) == 0

    rows = expected_rows(attention, w8a8, dtype)
    description = json.loads((target / "quant_model_description.json").read_text())
    wanted = {**HEADERS[attention, w8a8], **{name: label for name, label, *_ in rows}}
    assert list(description.items()) == list(wanted.items())

    file = target / f"quant_model_weight_{'w8a8' if w8a8 else 'float'}.safetensors"
    headers = read_headers([file])
    assert {name: (h.dtype, h.shape) for name, h in headers.items()} == {n: (d, s) for n, _, d, s in rows}
    assert [path.name for path in target.glob("*.safetensors")] == [file.name]
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == {name for name, *_ in rows}


def test_safetensors_order_is_that_of_the_library(converted: Callable[..., Path]) -> None:
    """msmodelslim saves by `safetensors.torch.save_file` too, which sorts by dtype and then by name."""
    file = converted(*FLAGS["C8"]) / "quant_model_weight_w8a8.safetensors"
    order = stored_order(file)
    headers = read_headers([file])
    wanted = ["I64", "F32", "I32", "I8"]
    dtypes = list(dict.fromkeys(headers[name].dtype for name in order))
    assert sorted(dtypes, key=wanted.index) == dtypes
    for dtype in dtypes:
        names = [name for name in order if headers[name].dtype == dtype]
        assert names == sorted(names)


def test_biases_keep_their_place(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", tiny_llama(attention_bias=True, mlp_bias=True))
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *FLAGS["C8"])) == 0
    rows = expected_rows("C8", True, "float32", biases=("self_attn", "mlp"))
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert list(description.items())[4:] == [(name, label) for name, label, *_ in rows]


def test_a_tied_head_is_described_and_stored_once(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", tiny_llama(tie_word_embeddings=True))
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *FLAGS["C8"])) == 0
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    stored = load_file(tmp_path / "out" / "quant_model_weight_w8a8.safetensors")
    assert list(description)[-1] == "lm_head.weight" and description["lm_head.weight"] == "FLOAT"
    assert description.keys() - stored.keys() == {*HEADERS["C8", True], "lm_head.weight"}


def test_numbers_of_w8a8(converted: Callable[..., Path]) -> None:
    """Every formula of the format, in float64, from the float weights and what the file itself says of the inputs."""
    floats = tiny_llama().state_dict()
    stored = load_file(converted(*FLAGS["C8"]) / "quant_model_weight_w8a8.safetensors")
    for name in (name.removesuffix(".deq_scale") for name in stored if name.endswith(".deq_scale")):
        tensors = {part: stored[f"{name}.{part}"] for part, *_ in W8A8_LINEAR if part != "bias"}
        weight = floats[f"{name}.weight"].double()
        scale = weight.abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(tensors["weight_scale"].double(), scale, atol=0, rtol=1e-6)
        assert (tensors["weight"] == (weight / scale).round()).double().mean() > 0.999
        assert (tensors["weight"].double() * scale - weight).abs().max() <= scale.max() * 0.501
        assert not tensors["weight_offset"].any() and int(tensors["weight"].min()) >= -127
        deq_scale = tensors["deq_scale"]
        torch.testing.assert_close(deq_scale.double(), tensors["input_scale"].double() * scale[:, 0], atol=0, rtol=1e-6)
        assert tensors["input_offset"].frac().eq(0).all() and -128 <= float(tensors["input_offset"]) <= 127
        sums = tensors["weight"].double().sum(1)
        assert torch.equal(tensors["quant_bias"].double(), (-tensors["input_offset"].double() * sums).round())


# Directories that msmodelslim wrote: no metadata in the file, nothing of ours in config.json, scales in half precision.


def slim_directory(
    directory: Path,
    attention: str,
    w8a8: bool,
    dtype: torch.dtype,
    asymmetric: bool = False,
    skip: tuple[int, ...] = (),
) -> dict[str, torch.Tensor]:
    """Write what msmodelslim would, by its own formulas; returns the tensors."""
    model = tiny_llama().to(dtype)
    generator = torch.Generator().manual_seed(3)
    weights = model.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    description: dict[str, Any] = dict(HEADERS[attention, w8a8])
    for name, label, _, shape in expected_rows(attention, w8a8, str(dtype).removeprefix("torch.")):
        layer, part = int(name.split(".")[2]) if ".layers." in name else -1, name.rpartition(".")[2]
        if label == "FAQuant" and layer in skip:
            continue
        description[name] = label
        linear = name.rpartition(".")[0]
        if label == "FLOAT":
            tensors[name] = weights[name]
        elif label == "FAQuant":
            is_scale = part == "scale"
            tensors[name] = torch.full(shape, 0.03, dtype=dtype) if is_scale else torch.zeros(shape, dtype=torch.int8)
        elif part == "kv_cache_scale":
            tensors[name] = (0.02 + 0.02 * torch.rand(shape, generator=generator)).to(dtype)
        elif part == "kv_cache_offset":
            offsets = torch.randint(-20, 20, shape, generator=generator) if asymmetric else torch.zeros(shape)
            tensors[name] = offsets.to(dtype)
        elif part == "weight":
            weight = weights[name]
            scale = weight.abs().amax(1, keepdim=True) / 127
            codes = (weight / scale).round().clamp(-127, 127).to(torch.int8)
            input_dtype = dtype if dtype == torch.bfloat16 else torch.float32
            input_scale = torch.tensor([0.05]).to(input_dtype)
            input_offset = torch.tensor([7.0]).to(input_dtype)
            deq_scale = (input_scale * scale).squeeze(1).float()
            is_bf16 = dtype == torch.bfloat16
            tensors |= {
                name: codes,
                f"{linear}.weight_scale": scale,
                f"{linear}.weight_offset": torch.zeros_like(scale),
                f"{linear}.input_scale": input_scale,
                f"{linear}.input_offset": input_offset,
                f"{linear}.quant_bias": (-input_offset.float() * codes.float().sum(1)).round().to(torch.int32),
                f"{linear}.deq_scale": deq_scale if is_bf16 else deq_scale.view(torch.int32).to(torch.int64),
            }
    directory.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / weight_file_names(description)[0])
    (directory / "quant_model_description.json").write_text(json.dumps(description, indent=2))
    config = tiny_config(dtype=str(dtype).removeprefix("torch."))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    return tensors


class Simulation:
    """A Llama in float64 whose linears, K, V and q go through quantize and dequantize, from the tensors of a file.

    Nothing of Octavo takes part: `transformers`' own eager Llama in float64, with hooks.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        transformers.AttentionInterface.register("simulation", self.attend)
        model = tiny_llama().double()
        model.load_state_dict({n: t for n, t in self.tensors.items() if n in model.state_dict()}, strict=False)
        model.set_attn_implementation("eager")
        model.config._attn_implementation = "simulation"
        transformers.AttentionMaskInterface.register("simulation", transformers.masking_utils.eager_mask)
        for name, module in model.named_modules():
            if f"{name}.input_scale" in self.tensors:
                module.forward = lambda x, name=name: self.linear(name, x)
        with torch.inference_mode():
            self.logits = model(ids).logits

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        t = {part: self.tensors[f"{name}.{part}"] for part in ("weight", "weight_scale", "input_scale", "input_offset")}
        codes = (x / t["input_scale"] + t["input_offset"]).round().clamp(-128, 127)
        inputs, weight = (codes - t["input_offset"]) * t["input_scale"], t["weight"] * t["weight_scale"]
        return functional.linear(inputs, weight, self.tensors.get(f"{name}.bias"))

    def through(self, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return ((x / scale + offset).round().clamp(-128, 127) - offset) * scale

    def attend(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **_: Any
    ) -> Any:
        prefix, heads = f"model.layers.{module.layer_idx}.self_attn", k.shape[1]
        if f"{prefix}.k_proj.kv_cache_scale" in self.tensors:
            parts = [
                self.tensors[f"{prefix}.{n}_proj.kv_cache_{p}"].view(heads, 1, -1)
                for n in "kv"
                for p in ("scale", "offset")
            ]
            k, v = self.through(k, *parts[:2]), self.through(v, *parts[2:])
        elif f"{prefix}.fa_k.scale" in self.tensors:
            q, k, v = (
                self.through(x, *(self.tensors[f"{prefix}.fa_{n}.{p}"].view(-1, 1, 1) for p in ("scale", "offset")))
                for n, x in (("q", q), ("k", k), ("v", v))
            )
        k, v = (x.repeat_interleave(q.shape[1] // heads, 1) for x in (k, v))
        weights = (q @ k.mT * scaling + mask[..., : k.shape[2]]).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous(), weights


@pytest.mark.parametrize("w8a8", [False, True], ids=["float linears", "w8a8"])
@pytest.mark.parametrize("variant", ["C8", "C8 asymmetric", "FAQuant", "FAQuant but for layer 1"])
def test_a_directory_of_msmodelslim_in_float32(variant: str, w8a8: bool, tmp_path: Path) -> None:
    """Logits are those of an independent simulation in float64, and far from those of the float model."""
    attention = variant.split()[0]
    tensors = slim_directory(
        tmp_path / "slim", attention, w8a8, torch.float32, "asym" in variant, (1,) if "layer 1" in variant else ()
    )
    ids = random_ids(2, 40)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "slim").eval()
    with torch.inference_mode():
        logits = model(ids).logits.double()
        plain = tiny_llama()(ids).logits.double()
    wanted = Simulation(tensors, ids).logits
    error = rmse_in_std(logits, wanted)
    distance = (wanted - plain).square().mean().sqrt() / wanted.std()
    # Rounding noise tips a few codes over; a wrong scale, offset or layer is as far off as quantization itself.
    assert error < 0.1 * distance and error < TOLERANCES["simulation rmse float32"], (error, distance)
    assert model.scheme.float_layers == ((1,) if "layer 1" in variant else ())
    assert model.scheme.name == ("ascend-c8" if attention == "C8" else "ascend-fa")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("attention", ["C8", "FAQuant"])
def test_a_directory_of_msmodelslim_in_half_precision(attention: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = slim_directory(tmp_path / "slim", attention, True, dtype)
    ids = random_ids(2, 40)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "slim").eval()
    assert model.dtype == dtype
    wanted = Simulation(tensors, ids).logits

    def error() -> float:
        with torch.inference_mode():
            logits = model(ids).logits.double()
        return rmse_in_std(logits, wanted)

    assert error() < TOLERANCES["simulation rmse computed in half"]
    with whole_passes(model.base_model):  # rounding tips codes over, and with them words of a random model
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(tokens, model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
    model.float()
    assert error() < TOLERANCES[f"simulation rmse {str(dtype).removeprefix('torch.')}"]


def test_offsets_of_q_are_refused(tmp_path: Path) -> None:
    tensors = slim_directory(tmp_path / "slim", "FAQuant", False, torch.float32)
    tensors["model.layers.0.self_attn.fa_q.offset"] += 1
    save_file(tensors, tmp_path / "slim" / "quant_model_weight_float.safetensors")
    with pytest.raises(OctavoError, match="fa_q has an offset"):
        LlamaForCausalLM.from_pretrained(tmp_path / "slim")


def test_what_a_description_stands_for() -> None:
    c8 = {"kv_quant_type": "C8", "model.layers.1.self_attn.k_proj.kv_cache_scale": "C8"}
    assert described_scheme(c8, 3).float_layers == (0, 2)
    assert described_scheme({"model_quant_type": "W8A8"}, 3) is None
    with pytest.raises(OctavoError, match="W4A8"):
        quantized_linears({"a.weight": "W4A8"})
    assert quantized_linears({"a.weight": "W8A8", "a.bias": "FLOAT", "b.weight": "FLOAT"}) == {"a": "W8A8"}


def test_names_on_which_description_and_weights_disagree(converted: Callable[..., Path]) -> None:
    directory = converted(*FLAGS["C8"])
    description = json.loads((directory / "quant_model_description.json").read_text())
    headers = read_headers(directory.glob("*.safetensors"))
    check_description(description, headers, ())
    with pytest.raises(OctavoError, match=r"model\.norm\.weight"):
        check_description({k: v for k, v in description.items() if k != "model.norm.weight"}, headers, ())
