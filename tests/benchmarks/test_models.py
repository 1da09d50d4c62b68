"""The variants of `benchmarks/models.py`, on a shape that takes no time."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer

from octavo.common.runtime.cache.quantized_cache import QuantizedCache

from ..support import REPOSITORY

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
CPU = torch.device("cpu")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    module = import_module("models")
    monkeypatch.setitem(module.SHAPES, "tiny", TINY)
    yield module
    module._variants.cache_clear()


@torch.inference_mode()
def test_variants_are_near_the_float_model_and_leave_in_float_what_they_say(models: ModuleType) -> None:
    variants = models._variants("tiny", CPU)
    assert list(variants) == [*models.CONVERTED, "float weights + int8-token", models.FLOAT_VARIANT]
    models._check(variants, CPU)
    left = {
        what: {
            name.rpartition(".")[2]
            for name, module in variants[what][0].named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        for what in models.CONVERTED
    }
    assert left == {
        "eight-bit": set(),
        "W8A8 dynamic + C8": set(),
        "W8A8 + C8": {"down_proj", "lm_head"},
        "W4A16 + int8-token": {"lm_head"},
        "W4A16 + octavo-4": {"lm_head"},
    }
    schemes = [variants[what][0].scheme.name for what in models.CONVERTED]
    assert schemes == ["ascend-c8", "ascend-c8", "int8-token", "int8-token", "octavo-4"]


@torch.inference_mode()
def test_a_decode_step_reads_the_weights_and_the_cache(models: ModuleType) -> None:
    prepared, check = models._decode(200, "tiny", CPU)
    check()
    for variant in prepared:
        variant.run()
    nbytes = {variant.what: variant.nbytes for variant in prepared}
    octavo_4, int8, plain = (nbytes[name] for name in ("W4A16 + octavo-4", "W4A16 + int8-token", models.FLOAT_VARIANT))
    assert octavo_4 < int8 < plain


def test_bytes_of_a_cache_are_those_of_its_tokens_in_use(models: ModuleType) -> None:
    config = models.LlamaConfig(**TINY)
    cache = models._filled(QuantizedCache(config, "int8-token"), config, 100, CPU)
    stores = [store for layer in cache.layers for store in (layer.key_store, layer.value_store)]
    expected = sum(part[:, :, :100].nbytes for store in stores for part in store.parts())
    assert models._cache_bytes(cache, config) == expected


def test_a_text_of_numbers_has_those_tokens(models: ModuleType, tmp_path: Path) -> None:
    models.LlamaConfig(**TINY).save_pretrained(tmp_path)
    models._save_tokenizer(tmp_path)
    ids = models._ids(64, CPU)[0].tolist()
    assert AutoTokenizer.from_pretrained(tmp_path)(" ".join(map(str, ids)))["input_ids"] == ids
