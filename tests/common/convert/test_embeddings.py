"""Embeddings and last linears in int8: stored once where they are tied, on disk and in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo import ConvertRequest, OctavoError, convert
from octavo.common.convert.weights.embedding import embedding_parts
from octavo.common.runtime.quantized_embedding import QuantizedEmbedding, TiedLinear, rows_of_panels
from octavo.common.runtime.weight_only_linear import W8A16Linear
from octavo.models import gemma3, llama3
from octavo.ops.linear.packed import pack_weight

from ...models.loading import load_without_octavo, save_expected
from ...support import TEXTS, quantized_tensors, random_ids, save_source, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Tiny Llamas by whether embedding and head are tied."""
    return {
        is_tied: save_source(tmp_path_factory.mktemp("source"), tiny_llama(tie_word_embeddings=is_tied))
        for is_tied in (True, False)
    }


@pytest.fixture(scope="module")
def outputs(sources: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """Reports of their conversions."""
    asked = {"linear": "w8a16", "scheme": "int8-token", "embeddings": "int8", "calibration": TEXTS}
    return {
        is_tied: convert(ConvertRequest(source, tmp_path_factory.mktemp("made") / "out", **asked))
        for is_tied, source in sources.items()
    }


def load(output: Path) -> torch.nn.Module:
    return llama3.ARCHITECTURE.model_class.from_pretrained(output, dtype=torch.float32).eval()


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_directory_holds_each_matrix_once(
    is_tied: bool, outputs: dict[bool, Any], sources: dict[bool, Path]
) -> None:
    output = outputs[is_tied].output
    tensors = quantized_tensors(output)
    own = {name for name in tensors if name.startswith(HEAD)}
    assert own == (set() if is_tied else {f"{HEAD}.{part}" for part in ("weight", "weight_scale", "weight_offset")})
    assert {name for name in tensors if name.startswith(EMBEDDING)} == {
        f"{EMBEDDING}.weight",
        f"{EMBEDDING}.weight_scale",
    }
    source = AutoModelForCausalLM.from_pretrained(sources[is_tied]).get_input_embeddings().weight
    for part, expected in embedding_parts(source).items():
        assert torch.equal(tensors[f"{EMBEDDING}.{part}"], expected)
    description = json.loads((output / "quant_model_description.json").read_text())
    assert description[f"{EMBEDDING}.weight"] == "W8A16_EMBEDDING"
    assert description[f"{HEAD}.weight"] == ("W8A16_EMBEDDING" if is_tied else "W8A16")
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is is_tied


@pytest.mark.parametrize("is_tied", [True, False])
def test_what_is_summed_up_is_what_loads(is_tied: bool, outputs: dict[bool, Any], sources: dict[bool, Path]) -> None:
    report = outputs[is_tied]
    whole, ids = (
        AutoModelForCausalLM.from_pretrained(sources[is_tied]).eval(),
        tiny_tokenizer()(TEXTS[-1], return_tensors="pt"),
    )
    model = load(report.output)
    with torch.inference_mode():
        expected, found = (m(ids["input_ids"]).logits[0, :-1].double().log_softmax(-1) for m in (whole, model))
    kl = float((expected.exp() * (expected - found)).sum(-1).mean())
    # layers run one by one there and in one call here: some inputs round to the code beside
    assert report.fidelity.kl == pytest.approx(kl, rel=0.1)
    assert report.other_fidelity.kl != report.fidelity.kl
    assert "embedding and last linear in int8 (inputs on the CPU in int8)" in report.summary()


def test_a_tied_head_is_the_embedding(outputs: dict[bool, Any]) -> None:
    model = load(outputs[True].output)
    embedding, head = model.get_input_embeddings(), model.lm_head
    assert type(embedding) is QuantizedEmbedding and type(head) is TiedLinear and head.embedding is embedding
    assert not list(head.parameters()) and not list(head.buffers())
    assert head.packed().codes.data_ptr() == embedding.pack().codes.data_ptr() and torch.equal(
        head.weight, embedding.weight
    )
    held = sum(part.nbytes for part in embedding.buffers())
    assert held == 320 * 64 + 320 * 2 * 2, "panels of codes, and scales in 16 bits"
    model.tie_weights()
    count = sum(tensor.numel() for tensor in model.state_dict().values() if tensor.shape[:1] == (320,))
    assert count == 320 * 64 + 320 * 2, "codes and two scales a row"
    untied = load(outputs[False].output)
    assert type(untied.lm_head) is W8A16Linear and untied.lm_head.cpu_activations == "int8"


def test_codes_of_an_embedding_count_as_its_weights(outputs: dict[bool, Any]) -> None:
    for is_tied, report in outputs.items():
        model, stock = load(report.output), tiny_llama(tie_word_embeddings=is_tied)
        for exclude in (False, True):
            assert model.num_parameters(exclude_embeddings=exclude) == stock.num_parameters(exclude_embeddings=exclude)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_gradient_through_the_head_is_refused(is_tied: bool, outputs: dict[bool, Any]) -> None:
    head = load(outputs[is_tied].output).lm_head
    x = torch.randn(2, head.in_features if not is_tied else head.embedding.embedding_dim, requires_grad=True)
    with pytest.raises(OctavoError, match=r"a W8A16.* linear has no gradient: train the float model"):
        head(x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_codes_times_scales_in_the_dtype_of_the_model(dtype: torch.dtype, outputs: dict[bool, Any]) -> None:
    model = load(outputs[True].output).to(dtype)
    ids, embedding = random_ids(2, 7), model.get_input_embeddings()
    rows = embedding(ids)
    assert rows.dtype == dtype and torch.equal(rows, embedding.float_weight()[ids].to(dtype))
    assert embedding.weight_scale.dtype == torch.float32
    assert model(ids).logits.dtype == dtype


def test_a_factor_of_the_embedding_stays(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    source = save_source(tmp_path / "source", Gemma3ForCausalLM(config))
    convert(ConvertRequest(source, tmp_path / "out", linear=None, embeddings="int8", calibration=TEXTS))
    model = gemma3.ARCHITECTURE.model_class.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain, ids = AutoModelForCausalLM.from_pretrained(source).get_input_embeddings(), random_ids(1, 9)
    torch.testing.assert_close(
        model.get_input_embeddings()(ids), plain(ids), rtol=0, atol=0.01 * float(plain(ids).detach().abs().max())
    )


def test_directories_load_without_octavo(outputs: dict[bool, Any], tmp_path: Path) -> None:
    rows = []
    for is_tied, report in outputs.items():
        save_expected(
            llama3.ARCHITECTURE.model_class.from_pretrained(report.output), tmp_path / f"{is_tied}.safetensors"
        )
        rows.append((str(is_tied), str(report.output), str(tmp_path / f"{is_tied}.safetensors")))
    for name, found in load_without_octavo(rows, tmp_path).items():
        assert found[:3] == [True] * 3, name


def test_what_says_twice_what_the_head_is_is_refused(sources: dict[bool, Path], tmp_path: Path) -> None:
    asked = {"embeddings": "int8", "linear": "w8a16", "calibration": TEXTS}
    for float_head in (True, False):
        with pytest.raises(OctavoError, match=rf"embeddings int8 and float_head={float_head} exclude each other"):
            ConvertRequest(sources[True], tmp_path / "out", float_head=float_head, **asked)
    for is_tied, source in sources.items():
        for names in ("lm_head", "lm*"):
            request = ConvertRequest(source, tmp_path / f"{is_tied}", float_linears=["*.q_proj", names], **asked)
            with pytest.raises(OctavoError) as refused:
                convert(request)
            assert str(refused.value) == (
                f"embeddings int8 and float_linears {names} exclude each other: both say what lm_head is"
            )
            assert not request.output.exists()


def test_inputs_stay_float_where_it_is_said(sources: dict[bool, Path], tmp_path: Path) -> None:
    asked = {"linear": "w4a16", "calibration": TEXTS}
    reports = {
        activations: convert(
            ConvertRequest(sources[False], tmp_path / activations, cpu_activations=activations, **asked)
        )
        for activations in ("int8", "float")
    }
    for activations, report in reports.items():
        stated = json.loads((report.output / "config.json").read_text())["octavo"]["cpu_activations"]
        linear = load(report.output).model.layers[0].mlp.up_proj
        assert stated == linear.cpu_activations == activations
    assert reports["int8"].fidelity == reports["float"].other_fidelity
    assert reports["float"].fidelity == reports["int8"].other_fidelity != reports["int8"].fidelity


def test_rows_that_are_not_there_are_refused() -> None:
    panels = pack_weight(torch.zeros(5, 32, dtype=torch.int8), torch.ones(5), None, 8)
    for ids in ([5], [-1]):  # the panel has rows up to 16
        with pytest.raises(IndexError, match="out of range"):
            rows_of_panels(panels, torch.tensor(ids))
