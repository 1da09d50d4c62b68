"""How many parameters a quantized model says that it has: those of its float model, however codes are packed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM as StockLlama

from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ..support import tiny_config

WAYS = {
    "W8A8": (),
    "W8A8_DYNAMIC, lm_head too": ("--is_dynamic", "True", "--disable_last_linear", "False"),
    "W4A16": ("--w_bit", "4", "--a_bit", "16", "--disable_last_linear", "False"),
    "W8A8_MIXED": (
        "--quantization",
        "w8a8_mixed",
    ),
    "float": ("--w_bit", "16", "--a_bit", "16", "--use_kvcache_quant", "True"),
}


@pytest.mark.parametrize("way", WAYS)
def test_codes_count_as_the_weights_that_they_stand_for(way: str, converted: Callable[..., Path]) -> None:
    stock, model = StockLlama(tiny_config()), LlamaForCausalLM.from_pretrained(converted(*WAYS[way]))
    for exclude in (False, True):
        assert model.num_parameters(exclude_embeddings=exclude) == stock.num_parameters(exclude_embeddings=exclude)
    assert (model.num_parameters(only_trainable=True) == stock.num_parameters()) == (way == "float")
