"""On a real, deep model: logits do not depend on how a prompt is cut.

In float64, because in float32 the linear layers of transformers round differently for different numbers of tokens; a
difference of 1e-7 tips a code over where k or v lies in the middle between two codes, and 30 layers amplify that. In
float64 this does not happen, and what is left is the property itself: every query reads what is stored.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.common.convert.calibration.texts import default_texts
from octavo.common.runtime.cache.quantized_cache import QuantizedCache

from ....support import with_cache
from ....tolerances import TOLERANCES

TOKENS = {1: 48, 7: 48, 64: 520, 512: 520}
"""How many tokens are cut into chunks of each size: few where there are many chunks."""


@pytest.mark.slow
def test_logits_of_smollm2_do_not_depend_on_how_a_prompt_is_cut(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float64).eval()
    model.set_attn_implementation("octavo")
    text = " ".join(default_texts()[:4])
    ids = AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt")["input_ids"][:, : max(TOKENS.values())]
    assert ids.shape[1] == max(TOKENS.values())

    with torch.inference_mode():
        whole = model(ids, **with_cache(QuantizedCache(model.config, "int8-token"))).logits
        for chunk, tokens in TOKENS.items():
            cache = QuantizedCache(model.config, "int8-token")
            parts = [model(part, **with_cache(cache)).logits for part in ids[:, :tokens].split(chunk, dim=1)]
            difference = torch.cat(parts, dim=1) - whole[:, :tokens]
            assert float(difference.abs().max()) < TOLERANCES["logits"], f"chunks of {chunk}"
