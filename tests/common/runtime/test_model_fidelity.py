"""How far quantized attention is from float on a real model: small versions of the published figures."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from octavo.common.convert.calibration.observe import calibrate
from octavo.common.convert.calibration.texts import read_calibration_file, tokenize
from octavo.common.convert.measure.fidelity import Fidelity, compare, windows
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.static_scales import scales_of

from ...support import with_cache
from ...tolerances import TOLERANCES

pytestmark = pytest.mark.slow

TOKENS = 2048


@pytest.fixture(scope="module")
def fidelity(testbed: Path) -> Callable[[str], Fidelity]:
    """`fidelity(scheme)`: SmolLM2 on one window of Wikipedia, calibrated on the prompts of BoolQ."""
    folder = testbed / "smollm2-135m"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = read_calibration_file(testbed / "boolq.jsonl")[:16]  # of 50, for time
    samples = tokenize(tokenizer, texts, TOKENS, "input_ids", "attention_mask")
    assert max(sample["input_ids"].shape[1] for sample in samples) < 512, "short prompts, scored at 2,048 tokens"
    statistics = calibrate(model, [], samples)
    text = (testbed / "wikipedia-eval.txt").read_text(encoding="utf-8")
    window = windows(tokenizer(text[:100_000], return_tensors="pt")["input_ids"][0], TOKENS, 1)
    with torch.inference_mode():
        expected = model(window[0]).logits
    model.set_attn_implementation("octavo")

    def measure(name: str) -> Fidelity:
        scheme = load_scheme(name)
        scales = scales_of(scheme, statistics) if scheme.is_static else None
        return compare(
            lambda _: expected,
            lambda ids: model(ids, **with_cache(QuantizedCache(model.config, scheme, scales=scales))).logits,
            window,
        )

    return measure


@pytest.mark.parametrize("scheme", ["int8-token", "ascend-c8", "ascend-fa"])
def test_kl_on_a_window_of_2048_tokens(scheme: str, fidelity: Callable[[str], Fidelity]) -> None:
    found = fidelity(scheme)
    print(found)
    assert found.tokens == TOKENS - 1
    assert 1e-5 < found.kl <= TOLERANCES[f"kl {scheme}"]
    assert found.perplexity < found.float_perplexity * 1.02 and found.top1 > 0.95
