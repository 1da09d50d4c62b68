"""Quantized checkpoints as models of the zoo without a conversion: what they compute is what the converted ones do."""

from pathlib import Path

import pytest
import torch

from octavo import OctavoError, load_quantized
from octavo.common.convert.source.quantized.files import READERS
from octavo.common.runtime.checkpoint.loading import OTHERS_CODES
from octavo.models.llama3 import ARCHITECTURE

from ...support import random_ids
from .source.coded_layouts import FLOAT_INPUTS, PASSED, converted
from .source.coded_sources import write_coded
from .source.test_cache_scales import SOURCE, scales, write_scaled

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(
    source: Path, target: Path, scheme: str, *flags: str, dtype: torch.dtype = torch.float32, **options: str
) -> None:
    """Logits and greedy tokens of both ways are equal bit for bit."""
    out = converted(source, target, "--scheme", scheme, *flags)
    expected = ARCHITECTURE.model_class.from_pretrained(out, dtype=dtype).eval()
    found, ids = load_quantized(source, scheme, dtype=dtype, **options), random_ids(2, 24)
    assert type(found) is type(expected) and found.dtype == expected.dtype and not found.training
    for (name, one), other in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one.float(), other.float()), name
    with torch.inference_mode():
        assert torch.equal(found(ids).logits, expected(ids).logits)
        tokens = [model.generate(ids, max_new_tokens=8, do_sample=False) for model in (found, expected)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", PASSED)
def test_it_is_the_model_that_a_conversion_makes(name: str, tmp_path: Path) -> None:
    write_coded(tmp_path / "source", PASSED[name])
    assert_same(tmp_path / "source", tmp_path / "out", "int8-token")


@pytest.mark.parametrize("name", ["gptq", "int-quantized, static"])
def test_in_half_precision(name: str, tmp_path: Path) -> None:
    write_coded(tmp_path / "source", PASSED[name])
    assert_same(tmp_path / "source", tmp_path / "out", "int8-token", dtype=torch.bfloat16)


def test_an_embedding_that_is_tied(tmp_path: Path) -> None:
    write_coded(tmp_path / "source", PASSED["awq"], tie_word_embeddings=True)
    assert_same(tmp_path / "source", tmp_path / "out", "int8-token", *FLOAT_INPUTS, cpu_activations="float")


def test_a_last_linear_in_codes(tmp_path: Path) -> None:
    write_coded(tmp_path / "source", PASSED["awq"], head=True)
    assert_same(tmp_path / "source", tmp_path / "out", "float")


def test_scales_of_the_source(tmp_path: Path) -> None:
    kept = scales("kv", 1) | scales("q", 1)
    write_scaled(tmp_path / "source", kept)
    assert_same(tmp_path / "source", tmp_path / "out", "vllm-fp8", *SOURCE, kv_scales="source")


def test_what_is_not_loaded(source: Path, tmp_path: Path) -> None:
    write_scaled(tmp_path / "source", scales("kv", 1))
    with pytest.raises(OctavoError, match="scheme ascend-c8: quantizes K and V by scales of calibration; convert the"):
        load_quantized(tmp_path / "source", "ascend-c8")
    with pytest.raises(OctavoError, match="scheme vllm-fp8: quantizes q, and the source keeps no scale of it; convert"):
        load_quantized(tmp_path / "source", "vllm-fp8", kv_scales="source")
    with pytest.raises(OctavoError, match="no linear is in codes; load it by from_pretrained"):
        load_quantized(source)
    with pytest.raises(OctavoError, match="no such directory"):
        load_quantized(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["awq", "gptq", "pack-quantized", "fp8"])
def test_from_pretrained_names_it(name: str, tmp_path: Path) -> None:
    write_coded(tmp_path / "source", PASSED[name])
    method = PASSED[name].config["quant_method"]
    with pytest.raises(OctavoError, match=f"quantized by {method}.*octavo.load_quantized"):
        ARCHITECTURE.model_class.from_pretrained(tmp_path / "source")


def test_a_bundle_names_all_that_is_read_here() -> None:
    assert set(OTHERS_CODES) == set(READERS)
