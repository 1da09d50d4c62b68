"""Statistics of the tiny models, models that read codes, and caches of every preset."""

from typing import Any

import pytest
import torch

from octavo.common.convert.calibration.whole import calibrate_whole
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import PRESETS, load_scheme
from octavo.common.runtime.static_scales import Statistics, scales_of
from octavo.common.stock_model import prepare

from ....support import random_ids
from .models import KINDS, Make, build, scheme_for


@pytest.fixture(scope="package")
def found() -> dict[str, Statistics]:
    """Statistics of each model, codebooks included."""
    samples = [{"input_ids": random_ids(1, 250, seed=seed)} for seed in (7, 8)]
    result = {}
    for kind in ("llama", "qwen2"):
        model = build(kind)
        result[kind] = calibrate_whole(model, samples, map(load_scheme, PRESETS))
    return {**result, "qwen2 folded": result["qwen2"]}


@pytest.fixture(scope="package")
def readers() -> dict[str, torch.nn.Module]:
    """Each model, reading codes."""
    made = {kind: build(kind) for kind in KINDS}
    for kind, model in made.items():
        prepare(model) if kind == "qwen2 folded" else model.set_attn_implementation("octavo")
    return made


@pytest.fixture(scope="package")
def cache(found: dict[str, Statistics], readers: dict[str, torch.nn.Module]) -> Make:
    """`cache(preset, kind, ...)`: an empty cache."""

    def make(preset: str, kind: str = "llama", **arguments: Any) -> QuantizedCache:
        scheme = scheme_for(kind, preset)
        scales = scales_of(scheme, found[kind]) if scheme.is_static else None
        return QuantizedCache(readers[kind].config, scheme, scales=scales, **arguments)

    return make
