"""Gemma 3, whose norms multiply by 1 + w, whose embedding has a scale and whose RoPE depends on the kind of layer."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

from octavo import ConvertRequest, QuantizedCache, convert, prepare
from octavo.common.convert.api import main
from octavo.common.convert.outliers.smooth import SMOOTHINGS, smooth_layer
from octavo.common.convert.pipeline import Conversion
from octavo.common.convert.source.checkpoint import layerwise_source
from octavo.common.errors import OctavoError
from octavo.models.gemma3 import ARCHITECTURE
from octavo.models.gemma3.modeling_gemma3_fa3 import Gemma3ForCausalLM

from ..common.convert.outliers.test_smooth import LINEARS, int8_error, layer_inputs
from ..support import (
    REPOSITORY,
    TEXTS,
    assert_one_error_line,
    convert_flags,
    edit_json,
    files_below,
    random_ids,
    save_source,
    tiny_tokenizer,
    with_cache,
)
from ..tolerances import TOLERANCES
from .gemma3 import Simulation, outputs, relative, tiny_gemma

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {"num_hidden_layers": 2, "sliding_window_pattern": 2, "head_dim": 256, "num_key_value_heads": 1}
C8 = ("--use_kvcache_quant", "True")
FLOAT_LINEARS = ("--w_bit", "16", "--a_bit", "16")
FLOAT_INPUTS = ("--cpu_activations", "float")
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "w8a8, C8": ({}, C8),
    "w8a8, FA": ({}, ("--use_fa_quant", "True")),
    "dynamic, int8-token": ({}, ("--is_dynamic", "True", "--scheme", "int8-token")),
    "w8a16, octavo-4": ({}, ("--w_bit", "8", "--a_bit", "16", "--scheme", "octavo-4", *FLOAT_INPUTS)),
    "w4a16, kvquant-4": ({}, ("--w_bit", "4", "--a_bit", "16", "--scheme", "kvquant-4", *FLOAT_INPUTS)),
    "float, vllm-fp8": ({}, (*FLOAT_LINEARS, "--scheme", "vllm-fp8")),
    "smoothed, C8": ({}, ("--anti_method", "m4", *C8)),
    "smoothed with the head, octavo-4": (
        {},
        ("--anti_method", "m6", "--disable_last_linear", "False", "--is_dynamic", "True", "--scheme", "octavo-4"),
    ),
    "biases, vllm-fp8": ({"attention_bias": True}, ("--is_dynamic", "True", "--scheme", "vllm-fp8")),
    "wide, FA": (WIDE, ("--use_fa_quant", "True")),
    "wide, octavo-4": (WIDE, (*FLOAT_LINEARS, "--scheme", "octavo-4")),
    "caps of logits, C8": ({"final_logit_softcapping": 3.0}, C8),
}
"""Name to changes of the tiny Gemma and flags of the conversion."""


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`variants(name)`: the directory of a variant, converted when it is first asked for."""
    root, made = tmp_path_factory.mktemp("gemma"), {}

    def get(name: str) -> Path:
        if name not in made:
            changes, flags = VARIANTS[name]
            source = save_source(root / f"source of {name}", tiny_gemma(**changes))
            assert main(ARCHITECTURE, convert_flags(source, root / name, *flags)) == 0
            made[name] = root / name
        return made[name]

    return get


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_computes_what_a_simulation_does(name: str, variants: Callable[[str], Path]) -> None:
    """Layer by layer, since a code that rounding tips over tips others over in the layers behind it."""
    quantized = Gemma3ForCausalLM.from_pretrained(variants(name)).eval()
    ids = random_ids(1, 90)
    wanted = outputs(Simulation(quantized).model, ids)
    errors = [relative(*pair) for pair in zip(outputs(quantized, ids, wanted), wanted, strict=True)]
    assert len(errors) == 1 + quantized.config.num_hidden_layers
    assert max(errors) < TOLERANCES["simulation rmse float32"], errors
    plain = tiny_gemma(**VARIANTS[name][0])
    distance = relative(wanted[-1], outputs(plain, ids)[-1])
    assert 10 * max(errors) < distance < (0.8 if "kvquant" in name else 0.3), (errors, distance)


# Smoothing.


def with_outliers(model: torch.nn.Module) -> torch.nn.Module:
    """The same function, where some channels of what the norms make are loud."""
    loud = [3, 17, 40]
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            consumers = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
            for norm, linears in zip((layer.input_layernorm, layer.pre_feedforward_layernorm), consumers, strict=True):
                norm.weight[loud] = 40 * (1 + norm.weight[loud]) - 1
                for linear in linears:
                    linear.weight[:, loud] /= 40
    return model


def rewritten(model: torch.nn.Module, method: str, stored: torch.dtype) -> None:
    """Smooth every layer by what is seen before, to be stored in a dtype."""
    for layer, inputs in zip(model.model.layers, layer_inputs(model), strict=True):
        done = smooth_layer(layer, inputs, method, LINEARS, int8_error, ARCHITECTURE.decoder, lambda _: stored)
        assert {"input_layernorm", "pre_feedforward_layernorm"} <= {subgraph.producer for subgraph in done}


@pytest.mark.parametrize("method", SMOOTHINGS)
@torch.no_grad()
def test_smoothing_keeps_logits(method: str) -> None:
    model, ids = with_outliers(tiny_gemma()).double(), random_ids(2, 24)
    expected = model(ids).logits
    rewritten(model, method, torch.float64)
    assert relative(model(ids).logits, expected) < 2e-6, "its norms compute in float32, whatever they are given"


@pytest.mark.parametrize("method", SMOOTHINGS)
@torch.no_grad()
def test_smoothing_keeps_logits_with_norms_stored_in_bfloat16(method: str) -> None:
    """Scales are such that `(1 + w) / s - 1` is a number of bfloat16, which near -1 has few of them."""
    model, ids = with_outliers(tiny_gemma(initializer_range=0.02)).bfloat16().float(), random_ids(2, 24)
    expected = model(ids).logits
    rewritten(model, method, torch.bfloat16)
    smallest = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.pre_feedforward_layernorm):
            norm.weight.copy_(norm.weight.bfloat16())
            smallest.append(float((1 + norm.weight).min()))
    assert relative(model(ids).logits, expected) < TOLERANCES["logits"]
    assert method != "m1" or min(smallest) < 0.3


# What is loaded, and what is refused.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_scaled_as_in_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    """Layers are converted in float32, as sqrt(hidden) is; a load in bfloat16 rounds it, as one of the stock model."""
    stock, ids = tiny_gemma(hidden_size=72).bfloat16(), random_ids(1, 9)
    source = save_source(tmp_path / "source", stock)
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *C8)) == 0
    loaded = Gemma3ForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    expected = transformers.Gemma3ForCausalLM.from_pretrained(source, dtype=dtype).model.embed_tokens(ids)
    assert torch.equal(loaded.model.embed_tokens(ids), expected)
    if dtype == torch.float32:
        converted = layerwise_source(source, "cpu").embedded(ids)
        assert torch.equal(converted, expected)
        plain = stock.model.embed_tokens.weight.float()[ids]
        assert (
            torch.equal(expected, plain * torch.tensor(72**0.5)) and float(torch.tensor(72**0.5).bfloat16()) != 72**0.5
        )


def test_the_fidelity_that_is_reported_counts_caps(
    variants: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    name = "caps of logits, C8"
    target = variants(name).with_name("again")
    assert main(ARCHITECTURE, convert_flags(variants(name).with_name(f"source of {name}"), target, *C8)) == 0
    stated = float(next(row for row in capsys.readouterr().out.splitlines() if row.startswith("KL")).split()[-1])
    quantized, plain, found = Gemma3ForCausalLM.from_pretrained(target), tiny_gemma(final_logit_softcapping=3.0), []
    for text in TEXTS:
        ids = tiny_tokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected, other = (model(ids).logits[0, :-1].log_softmax(-1) for model in (plain, quantized.eval()))
        found.append(float(functional.kl_div(other, expected, log_target=True, reduction="batchmean")))
    assert min(abs(kl - stated) for kl in found) < 1e-4, (stated, found)


def test_a_checkpoint_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    """RoPE is stated by the layers' kinds in keys of its own, and a cache is chosen in both files."""
    source = save_source(tmp_path / "source", tiny_gemma())
    cache = {"cache_implementation": "hybrid"}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None, "sliding_window_pattern": 3}
    edit_json(source / "config.json", rope_parameters=None, layer_types=None, transformers_version="4.50.0", **old)
    edit_json(source / "config.json", **cache)
    edit_json(source / "generation_config.json", **cache)
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *C8)) == 0
    model, ids = Gemma3ForCausalLM.from_pretrained(tmp_path / "out").eval(), random_ids(1, 40)
    with torch.inference_mode():
        assert relative(model(ids).logits, tiny_gemma()(ids).logits) < TOLERANCES["rmse of a tiny model, W8A8"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 43)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping bounds the scores of attention"),
        ({"use_bidirectional_attention": True}, "sees tokens that are still to come"),
    ],
)
def test_attention_of_another_form_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_source(tmp_path / "source", tiny_gemma(**changes))
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *C8)) == 1
    assert_one_error_line(capsys.readouterr().err, says)
    with pytest.raises(OctavoError, match=says):
        prepare(tiny_gemma(**changes))


def test_a_base_of_rope_that_is_missing_for_a_kind_of_layer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_source(tmp_path / "source", tiny_gemma())
    parameters = tiny_gemma().config.rope_parameters
    del parameters["sliding_attention"]["rope_theta"]
    edit_json(source / "config.json", rope_parameters=parameters)
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *C8)) == 1
    assert_one_error_line(capsys.readouterr().err, "rope_theta is missing in rope_parameters")


def test_a_checkpoint_that_takes_images_is_refused_and_its_text_model_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    text = tiny_gemma().config.to_dict()
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    source = save_source(tmp_path / "source", transformers.Gemma3ForConditionalGeneration(config).eval())
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *C8)) == 1
    says = "'gemma3'", "save its text model first", "models/gemma3/README.md"
    assert_one_error_line(capsys.readouterr().err, *says)
    with pytest.raises(OctavoError, match="save its text model first"):
        convert(ConvertRequest(model=str(source), output=tmp_path / "out"))

    readme = (REPOSITORY / "models" / "gemma3" / "README.md").read_text()
    lines = readme.partition("```python\n")[2].partition("```")[0]
    exec(lines, {**vars(transformers), "Gemma3ForCausalLM": transformers.Gemma3ForCausalLM,
                 "AutoTokenizer": transformers.AutoTokenizer, "M": source, "T": tmp_path / "text"})  # fmt: skip
    whole = transformers.Gemma3ForConditionalGeneration.from_pretrained(source).eval()
    alone, ids = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "text").eval(), random_ids(1, 20)
    with torch.inference_mode():
        assert torch.equal(alone(ids).logits, whole(ids).logits)
    assert main(ARCHITECTURE, convert_flags(tmp_path / "text", tmp_path / "out", *C8)) == 0


# The cache, resuming, and two lines.


@pytest.mark.parametrize("name", ["float, vllm-fp8", "wide, FA", "dynamic, int8-token"])
def test_generation_equals_recomputation_with_padding_and_in_chunks(name: str, variants: Callable[[str], Path]) -> None:
    model = Gemma3ForCausalLM.from_pretrained(variants(name)).eval()
    ids, mask = random_ids(2, 20), torch.ones((2, 20), dtype=torch.long)
    ids[1, :9], mask[1, :9] = model.config.pad_token_id, 0
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **arguments)
    for row, first in enumerate((0, 9)):
        expected = model.generate(ids[row : row + 1, first:], **arguments, use_cache=False)
        assert torch.equal(together[row : row + 1, first:], expected)
    chunked = model.generate(ids[:1], **arguments, prefill_chunk_size=7)
    assert torch.equal(chunked, together[:1])
    beams = model.generate(ids[:1], **arguments, num_beams=3)
    assert torch.equal(beams, model.generate(ids[:1], **arguments, num_beams=3, use_cache=False))


@pytest.mark.parametrize("name", ["float, vllm-fp8", "wide, octavo-4"])
@torch.inference_mode()
def test_chunks_and_what_is_cropped_leave_no_trace(name: str, variants: Callable[[str], Path]) -> None:
    model = Gemma3ForCausalLM.from_pretrained(variants(name)).double().eval()
    ids = random_ids(1, 100)
    whole, cache = model(ids).logits, model.new_cache()
    for size in (1, 7, 64):
        cache = model.new_cache()
        parts = torch.cat([model(part, **with_cache(cache)).logits for part in ids.split(size, dim=1)], dim=1)
        torch.testing.assert_close(parts, whole, atol=TOLERANCES["logits"], rtol=0)
    cache.crop(-5)
    again = model(ids[:, -5:], **with_cache(cache)).logits
    torch.testing.assert_close(again, whole[:, -5:], atol=TOLERANCES["logits"], rtol=0)


def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_source(tmp_path / "source", with_outliers(tiny_gemma()).bfloat16())
    flags = ("--anti_method", "m4", "--scheme", "kvquant-4")
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "whole", *flags)) == 0
    layer = Conversion.layer

    def interrupted(conversion: Conversion, index: int) -> dict[str, torch.Tensor]:
        if index == 4:
            raise KeyboardInterrupt
        return layer(conversion, index)

    with monkeypatch.context() as patched:
        patched.setattr(Conversion, "layer", interrupted)
        assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags)) == 130
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags, "--resume")) == 0
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")
    for name in files_below(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("changes", [{}, WIDE, {"attention_bias": True}], ids=["plain", "wide", "biases"])
@torch.inference_mode()
def test_two_lines_serve_the_stock_model(changes: dict[str, Any]) -> None:
    ids, mask = random_ids(2, 40), torch.ones((2, 40), dtype=torch.long)
    mask[1, :17] = 0
    model, stock = tiny_gemma(**changes), tiny_gemma(**changes)
    expected = stock(ids, attention_mask=mask).logits
    with (
        pytest.warns(UserWarning, match=r"layers\.0\.self_attn\.k_proj")
        if "attention_bias" in changes
        else nullcontext()
    ):
        prepare(model)
    for scheme, tolerance in (("float", TOLERANCES["logits"]), ("int8-token", 0.1), ("octavo-4", 0.2)):
        cache = QuantizedCache(model.config, scheme)
        found = model(ids, attention_mask=mask, **with_cache(cache)).logits
        assert relative(found[mask.bool()], expected[mask.bool()]) < tolerance, scheme
