"""The protocol under which the caches of transformers are measured beside ours."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from octavo.common.runtime.cache.quantized_cache import QuantizedCache

from ..support import REPOSITORY, random_ids, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return import_module("peers")


def test_a_float_cache_loses_nothing_and_others_something(peers: ModuleType) -> None:
    model = tiny_llama()
    samples = [random_ids(1, 300, seed=seed) for seed in (1, 2)]
    with torch.inference_mode():
        expected = [model(ids, logits_to_keep=150).logits for ids in samples]

    def kl(name: str) -> float:
        peer = peers.PEERS[name]
        result = peers.score(model, expected, samples, lambda: peers.peer_cache(peer, model), name)
        assert result.tokens == 2 * 149
        return result.kl

    assert kl("float") < 1e-9 < kl("fp8")
    model.set_attn_implementation("octavo")
    result = peers.score(model, expected, samples, lambda: QuantizedCache(model.config, "int8-token"), "int8-token")
    assert 1e-9 < result.kl < 0.1


def test_bits_count_scales_zeros_and_the_mean_residual(peers: ModuleType) -> None:
    assert peers.peer_bits(peers.PEERS["fp8"], 2048) == 8
    codes, floats = 4 + 32 / 64, 63.5 / 2048
    assert peers.peer_bits(peers.PEERS["hqq-int4"], 2048) == pytest.approx(codes * (1 - floats) + 16 * floats)


def test_what_is_not_installed_has_no_version(peers: ModuleType) -> None:
    assert peers.system_of(peers.Peer("no-such-package-at-all", "hqq", 8)) is None
    assert peers.system_of(peers.PEERS["float"]).startswith("transformers ")
