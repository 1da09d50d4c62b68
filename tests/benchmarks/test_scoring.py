"""What benchmarks score on: the figures are those of whole passes, and float's are from before the model changed."""

from importlib import import_module

import pytest
import torch

from octavo.common.convert.measure.fidelity import compare
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.stock_model import prepare

from ..support import REPOSITORY, random_ids, tiny_llama, with_cache

pytestmark = pytest.mark.usefixtures("one_thread")


def test_scores_are_those_of_whole_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    model, plain = tiny_llama(), tiny_llama()
    samples = [random_ids(1, 600, seed=seed) for seed in (1, 2)]
    reference = import_module("scoring").Reference(model, samples)
    prepare(model)

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, **with_cache(QuantizedCache(model.config, "octavo-2"))).logits

    found = compare(lambda ids: plain(ids).logits, logits_of, samples)
    assert reference.score("octavo-2", logits_of) == {
        "windows": "2",
        "length": "600",
        "kl": f"{found.kl:.6f}",
        "perplexity": f"{found.perplexity:.4f}",
        "float_perplexity": f"{found.float_perplexity:.4f}",
        "top1": f"{found.top1:.4f}",
    }
    assert found.kl > 1e-3
