"""OSCAR (arXiv 2605.17757): the preset against the paper's formulas, written out in float64."""

import pytest
import torch

from octavo.common.convert.calibration.bases import find_bases
from octavo.common.convert.calibration.whole import calibrate_whole
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.rotary import hadamard
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.static_scales import Statistics, scales_of

from ..support import random_ids, tiny_llama
from ..tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 400
SINKS, WINDOW = 64, 256
SAMPLES = [{"input_ids": random_ids(1, 200)}]


def papers_codes(x: torch.Tensor, clip: float) -> torch.Tensor:
    """INT2 asymmetric per token: `clip` of the range about its middle in four steps."""
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    low, high = low + (high - low) * (1 - clip) / 2, high - (high - low) * (1 - clip) / 2
    step = ((high - low) / 3).half().double()
    return ((x - low) / step).round().clamp(0, 3) * step + low


def test_what_is_stored_is_the_papers() -> None:
    model, scheme = tiny_llama(), load_scheme("oscar-2")
    scales = scales_of(scheme, calibrate_whole(model, SAMPLES, [scheme]))
    cache = QuantizedCache(model.config, scheme, scales=scales)
    states = torch.randn(2, 1, 2, TOKENS, 16, generator=torch.Generator().manual_seed(0))
    cache.update(states[0], states[1], 0)
    layer = cache.layers[0]
    for x, store, basis, clip in (
        (states[0], layer.key_store, scales[0].key_basis, 0.96),
        (states[1], layer.value_store, scales[0].value_basis, 0.92),
    ):
        coded = store.body.length
        assert coded == (TOKENS - SINKS - WINDOW) // 16 * 16
        expected = papers_codes((x.double() @ basis.double())[:, :, SINKS : SINKS + coded], clip)
        found = store.body.decoded(0, coded).double()
        is_close = (found - expected).abs() <= TOLERANCES["float16 zeros"] * expected.abs().amax()
        assert is_close.float().mean() > 0.999, "all but codes that tip over"


def test_the_rotation_of_k_is_by_eigenvectors_of_the_queries() -> None:
    model, seen = tiny_llama(), []
    first = model.model.layers[0].self_attn
    hook = first.q_proj.register_forward_hook(lambda *parts: seen.append(parts[2]))
    basis = find_bases(model, SAMPLES, Statistics({}, {})).tensors["layers.0.k.oscar"].double()
    hook.remove()
    tokens = seen[0].shape[1]
    query = seen[0].view(1, tokens, 4, 16).transpose(1, 2)
    cos, sin = model.model.rotary_emb(query, torch.arange(tokens)[None])
    turned = torch.cat((-query[..., 8:], query[..., :8]), dim=-1)
    query = (query * cos + turned * sin)[0].double().reshape(2, -1, 16)
    spread = hadamard(basis).transpose(1, 2) @ (query.transpose(1, 2) @ query) @ hadamard(basis)
    off = spread - torch.diag_embed(spread.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-4 * spread.diagonal(dim1=1, dim2=2).max()
