"""A converted directory read as what the dialects write, against the models that load it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo.common.convert.dialects.directory import OctavoDirectory
from octavo.common.errors import OctavoError

pytestmark = pytest.mark.usefixtures("one_thread")

LINEARS = {
    "w8a8": (),
    "w8a8 dynamic": ("--is_dynamic", "True"),
    "w8a16 groups": ("--quantization", "w8a16", "--group_size", "32", "--w_sym", "False"),
    "w4a16": ("--quantization", "w4a16", "--group_size", "32"),
    "w4a16 zeros": ("--quantization", "w4a16", "--w_sym", "False", "--disable_last_linear", "False"),
    "fp8": ("--quantization", "fp8"),
    "mixed": ("--quantization", "w8a8_mixed"),
}


def loaded(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)


@pytest.mark.parametrize("name", LINEARS)
def test_linears_stand_for_what_the_model_computes_with(name: str, converted: Callable[..., Path]) -> None:
    path = converted(*LINEARS[name])
    directory, model = OctavoDirectory(path), loaded(path)
    found = {part: m for part, m in model.named_modules() if hasattr(m, "float_weight")}
    assert set(directory.form.linears) == set(found)
    for part, module in found.items():
        expected = module.float_weight()
        assert torch.equal(directory.linear(part).float_weight(), expected)
        rows = torch.cat([rows for rows, _ in directory.float_rows(part)])
        assert torch.equal(rows, expected)
        form = directory.form.linears[part]
        assert (form.out_features, form.in_features) == tuple(expected.shape)
        assert form.symmetric == (directory.linear(part).zero is None)


def test_scales_are_those_of_the_cache(converted: Callable[..., Path]) -> None:
    path = converted("--use_fa_quant", "True")
    directory, model = OctavoDirectory(path), loaded(path)
    for index, layer in enumerate(model.model.layers):
        scales = directory.scales()[index]
        assert torch.equal(scales.key[0].flatten(), layer.self_attn.fa_k.scale.flatten())
        assert torch.equal(scales.query.flatten(), layer.self_attn.fa_q.scale.flatten())
    assert directory.form.attention(2) == "model.layers.2.self_attn"


def test_everything_else_is_float(converted: Callable[..., Path]) -> None:
    directory = OctavoDirectory(converted("--use_kvcache_quant", "True"))
    names = set(directory.floats())
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    assert not any("kv_cache" in name or "weight_scale" in name for name in names)
    assert directory.form.dtype == "F32" and directory.form.head == "lm_head"


@pytest.mark.parametrize("what", ["missing", "float"])
def test_what_no_conversion_wrote_is_refused(what: str, tmp_path: Path, source: Path) -> None:
    path = tmp_path / "none" if what == "missing" else source
    with pytest.raises(OctavoError, match="no such directory" if what == "missing" else "holds no quant_model_descrip"):
        OctavoDirectory(path)


def test_linears_in_float_are_named(converted: Callable[..., Path]) -> None:
    directory = OctavoDirectory(converted("--disable_names", "*.down_proj"))
    assert [name for name in directory.form.float_linears if name.endswith("down_proj")]
    assert not any(name.endswith("down_proj") for name in directory.form.linears)
