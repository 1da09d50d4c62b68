"""The way of quantized linear layers to disk and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from octavo.common.architecture import stated_or_known
from octavo.common.convert.output.shards import header_of
from octavo.common.convert.weights.quantize import quantize_linear
from octavo.common.errors import OctavoError
from octavo.common.runtime.checkpoint.ascend import (
    build_description,
    check_description,
    in_file_order,
    linear_layout,
    weight_file_names,
)
from octavo.common.runtime.checkpoint.buffers import attach_buffers
from octavo.common.runtime.checkpoint.files import read_headers
from octavo.common.runtime.quantized_linear import QuantizedLinear
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.schemes.linear_scheme import (
    FP8,
    FP8_DYNAMIC,
    INT4_LABELS,
    LINEAR_LABELS,
    W4A16,
    W8A8,
    W8A8_DYNAMIC,
    W8A8_MIXED,
    W8A16,
    LinearScheme,
)
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM as QuantizedLlama
from octavo.models.qwen2.modeling_qwen2_fa3 import Qwen2ForCausalLM as QuantizedQwen2
from octavo.ops.shared.codes import unpack_int4

from ....metrics import rmse_in_std
from ....support import edit_json, random_ids, randomized, tiny_config, tiny_llama
from ....tolerances import TOLERANCES
from ...convert.weights.test_quantize import every_scheme, name_of, seen

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES = pytest.mark.parametrize("scheme", every_scheme(), ids=name_of)


def tiny_qwen2() -> nn.Module:
    """A random Qwen2, whose q, k and v have biases."""
    fields = tiny_config(num_hidden_layers=2).to_diff_dict()
    known = {name: value for name, value in fields.items() if name not in ("model_type", "head_dim")}
    torch.manual_seed(0)
    return randomized(Qwen2ForCausalLM(Qwen2Config(**known)))


MODELS: dict[str, tuple[Callable[[], nn.Module], type]] = {
    "llama": (lambda: tiny_llama(num_hidden_layers=2), QuantizedLlama),
    "qwen2": (tiny_qwen2, QuantizedQwen2),
}


def quantized_tensors_of(model: nn.Module, schemes: dict[str, LinearScheme]) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint whose linears, by name, are quantized by schemes."""
    seen_by: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen_by.update({name: arguments[0].flatten(0, 1).float()})
        )
        for name in schemes
    ]
    with torch.no_grad():
        model(random_ids(2, 60))
    for hook in hooks:
        hook.remove()
    tensors = dict(model.state_dict())
    for name, scheme in schemes.items():
        parts = quantize_linear(model.get_submodule(name), seen(seen_by[name]), scheme, torch.float16)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def layout_of(tensors: dict[str, torch.Tensor], labels: dict[str, str]) -> dict[str, Any]:
    return linear_layout(labels, {name: header_of(tensor) for name, tensor in tensors.items()})


def save_quantized(
    directory: Path, model: nn.Module, tensors: dict[str, torch.Tensor], labels: dict[str, str], **keys: Any
) -> None:
    """A directory as conversions write it."""
    directory.mkdir()
    description = build_description(tensors, (), labels, load_scheme("float"), **keys)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / weight_file_names(description)[0]
    )
    (directory / "quant_model_description.json").write_text(json.dumps(description))
    model.config.save_pretrained(directory)


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]


@SCHEMES
@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_comes_back(kind: str, scheme: LinearScheme, tmp_path: Path) -> None:
    build, model_class = MODELS[kind]
    model = build()
    names = linear_names(model)
    tensors = quantized_tensors_of(model, dict.fromkeys(names, scheme))
    labels = dict.fromkeys(names, scheme.label)
    save_quantized(tmp_path / "out", model, tensors, labels, group_size=scheme.group_size)
    loaded = model_class.from_pretrained(tmp_path / "out").eval()
    ids = random_ids(2, 20)
    with torch.no_grad():
        found, plain = loaded(ids).logits, model(ids).logits
    by_hand = build()
    stated_or_known(by_hand)
    attach_buffers(by_hand, load_scheme("float"), layout_of(tensors, labels))
    by_hand.load_state_dict(tensors)
    with torch.no_grad():
        expected = by_hand(ids).logits
    torch.testing.assert_close(found, expected, atol=10 * TOLERANCES["logits"], rtol=0)
    limit = 0.6 if scheme.label in INT4_LABELS else 0.2
    assert rmse_in_std(found, plain) < limit
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor.float(), tensors[name].float()), name
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description.get("group_size", 0) == scheme.group_size and description["model_quant_type"] == scheme.label


def test_layers_of_one_model_may_be_of_all_kinds(tmp_path: Path) -> None:
    """Beside one another, in bfloat16, some in float; the model is called by most of them."""
    model = tiny_llama(num_hidden_layers=2).bfloat16()
    *names, last = linear_names(model)
    kinds = every_scheme()
    schemes = {name: kinds[index * 2 % len(kinds)] for index, name in enumerate(names)}
    assert {scheme.label for scheme in schemes.values()} == set(LINEAR_LABELS)
    labels = {name: scheme.label for name, scheme in schemes.items()}
    tensors = quantized_tensors_of(model, schemes)
    assert tensors[f"{last}.weight"].dtype == torch.bfloat16
    save_quantized(tmp_path / "out", model, tensors, labels, group_size=128)
    loaded = QuantizedLlama.from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == torch.bfloat16
    assert {n: m.LABEL for n, m in loaded.named_modules() if isinstance(m, QuantizedLinear)} == labels
    ids = random_ids(2, 20)
    with torch.no_grad():
        found, plain = loaded(ids).logits.float(), model(ids).logits.float()
    assert rmse_in_std(found, plain) < 0.4
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    most = max(labels.values(), key=list(labels.values()).count)
    assert list(labels.values()).count(description["model_quant_type"]) == list(labels.values()).count(most)


def test_biases_that_the_architecture_does_not_have(tmp_path: Path) -> None:
    """Of norms, of quantized linears and of float ones: shifts of inputs, as anti-outlier methods leave them."""
    model = tiny_llama(num_hidden_layers=2)
    names = linear_names(model)[:-1]
    tensors = quantized_tensors_of(model, dict.fromkeys(names, LinearScheme(W8A8_DYNAMIC)))
    shift = {
        f"{name}.bias": 0.3 * torch.randn(model.get_submodule(name).weight.shape[0])
        for name in (*names, "model.layers.1.mlp.down_proj", "model.layers.0.input_layernorm", "model.norm")
    }
    ids = random_ids(2, 20)
    save_quantized(tmp_path / "without", model, tensors, dict.fromkeys(names, W8A8_DYNAMIC))
    save_quantized(tmp_path / "with", model, tensors | shift, dict.fromkeys(names, W8A8_DYNAMIC))
    shifted = QuantizedLlama.from_pretrained(tmp_path / "with").eval()
    plain = QuantizedLlama.from_pretrained(tmp_path / "without").eval()
    for name in shift:
        module = plain.get_submodule(name.removesuffix(".bias"))
        module.register_forward_hook(lambda _, arguments, output, name=name: output + shift[name])
    with torch.no_grad():
        torch.testing.assert_close(shifted(ids).logits, plain(ids).logits, atol=10 * TOLERANCES["logits"], rtol=0)
    assert all(torch.equal(shifted.state_dict()[name], tensor) for name, tensor in shift.items())
    bad = {"model.embed_tokens.bias": torch.zeros(64)}
    save_quantized(tmp_path / "bad", model, tensors | bad, dict.fromkeys(names, W8A8_DYNAMIC))
    with pytest.raises(OctavoError, match="no linear layer and no norm"):
        QuantizedLlama.from_pretrained(tmp_path / "bad")


def test_int4_with_a_byte_for_each_code_is_loaded(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    names = linear_names(model)
    labels = dict.fromkeys(names, W4A16)
    tensors = quantized_tensors_of(model, dict.fromkeys(names, LinearScheme(W4A16, 32, symmetric=False)))
    unpacked = tensors | {f"{name}.weight": unpack_int4(tensors[f"{name}.weight"], 32) for name in names}
    save_quantized(tmp_path / "packed", model, tensors, labels)
    save_quantized(tmp_path / "unpacked", model, unpacked, labels)
    logits = []
    for name in ("packed", "unpacked"):
        loaded = QuantizedLlama.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            logits.append(loaded(random_ids(1, 10)).logits)
    torch.testing.assert_close(*logits, atol=10 * TOLERANCES["logits"], rtol=0)


@pytest.mark.parametrize("label", [W8A16, W4A16, W8A8_DYNAMIC])
def test_scales_that_are_stored_in_half_precision_are_float32_in_memory(label: str, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    names = linear_names(model)
    tensors = quantized_tensors_of(model, dict.fromkeys(names, LinearScheme(label)))
    tensors = {n: t.bfloat16() if n.endswith(("scale", "offset")) else t for n, t in tensors.items()}
    save_quantized(tmp_path / "out", model, tensors, dict.fromkeys(names, label))
    loaded = QuantizedLlama.from_pretrained(tmp_path / "out").eval()
    for name in names:
        layer = loaded.get_submodule(name)
        assert layer.weight_scale.dtype == layer.weight_offset.dtype == torch.float32
        assert torch.equal(layer.weight_scale, tensors[f"{name}.weight_scale"].float())
    with torch.no_grad():
        assert loaded(random_ids(1, 5)).logits.isfinite().all()


@pytest.fixture
def directory(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, str], nn.Module]:
    """A checkpoint in W4A16 in groups, on disk and in memory."""
    model = tiny_llama(num_hidden_layers=1)
    names = linear_names(model)
    labels = dict.fromkeys(names, W4A16)
    tensors = quantized_tensors_of(model, dict.fromkeys(names, LinearScheme(W4A16, 32)))
    save_quantized(tmp_path / "out", model, tensors, labels)
    return tmp_path / "out", tensors, labels, model


def test_disagreements_are_named(directory: tuple, tmp_path: Path) -> None:
    path, tensors, labels, model = directory
    name = "model.layers.0.mlp.up_proj"
    description = json.loads((path / "quant_model_description.json").read_text())
    headers = read_headers(path.glob("*.safetensors"))
    check_description(description, headers, ())
    wrong = {
        "labelled W8A16": {f"{name}.weight": W8A16},
        "labelled W8A8": {f"{name}.weight_scale": W8A8},
        "labelled FLOAT": {f"{name}.weight_offset": "FLOAT"},
        "stored as U8": {f"{name}.{part}": FP8 for part in ("weight", "weight_scale", "weight_offset")},
    }
    for message, change in wrong.items():
        with pytest.raises(OctavoError, match=message):
            check_description(description | change, headers, ())
    without = {key: value for key, value in description.items() if key != f"{name}.weight_offset"}
    with pytest.raises(OctavoError, match="weight_offset is missing"):
        check_description(without, {key: headers[key] for key in headers if key in without}, ())
    save_quantized(tmp_path / "three", model, tensors | {f"{name}.weight_scale": torch.ones(128, 3)}, labels)
    with pytest.raises(OctavoError, match=f"{name}: W4A16 with 3 scales for 64"):
        QuantizedLlama.from_pretrained(tmp_path / "three")
    flat = {f"{name}.weight_scale": torch.ones(128)}
    with pytest.raises(OctavoError, match=f"{name}.weight_scale is stored as"):
        layout_of(tensors | flat, labels)
    edit_json(path / "quant_model_description.json", **{"model.layers.0.mlp.up_proj.weight": "W4A4"})
    with pytest.raises(OctavoError, match="W4A4"):
        QuantizedLlama.from_pretrained(path)


def test_parts_have_a_place_in_the_file() -> None:
    model = tiny_llama(num_hidden_layers=1)
    names = linear_names(model)
    kinds = (W8A8_MIXED, FP8_DYNAMIC, FP8)
    tensors = quantized_tensors_of(model, {n: LinearScheme(kinds[i % 3]) for i, n in enumerate(names)})
    ordered = list(in_file_order(model, tensors))
    assert sorted(ordered) == sorted(tensors)
    prefix = f"{names[0]}."
    parts = [name.removeprefix(prefix) for name in ordered if name.startswith(prefix)]
    assert parts == ["weight", "weight_scale", "weight_offset", "outlier_columns", "outlier_weight"]
