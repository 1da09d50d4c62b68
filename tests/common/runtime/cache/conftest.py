"""Fixtures of the tests of the cache: a tiny Llama in float, one that reads codes, and caches for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.common.convert.calibration.observe import calibrate
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import Scheme

from ....support import random_ids, tiny_llama
from .tiny import two_lines


@pytest.fixture(scope="module")
def stock() -> torch.nn.Module:
    """The float oracle."""
    return tiny_llama()


@pytest.fixture(scope="module")
def reader() -> torch.nn.Module:
    """The same model, reading codes."""
    return two_lines(tiny_llama())


@pytest.fixture(scope="module")
def statistics(stock: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration statistics of the tiny Llama, as a file."""
    file = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    calibrate(stock, [], [{"input_ids": random_ids(1, 200, seed=seed)} for seed in range(4)]).save(file)
    return file


@pytest.fixture
def cache(reader: torch.nn.Module, statistics: Path) -> Callable[..., QuantizedCache]:
    """`cache(scheme, ...)`: an empty cache for the tiny Llama."""

    def make(scheme: str | Scheme, **arguments: Any) -> QuantizedCache:
        return QuantizedCache(reader.config, scheme, statistics=statistics, **arguments)

    return make
