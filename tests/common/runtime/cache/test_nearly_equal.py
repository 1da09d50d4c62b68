"""Groups of nearly equal values, whose zero points are far beyond the range of float16 at a scale of their range."""

import pytest
import torch

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.schemes.tensor_codec import Codec
from octavo.common.stock_model import prepare

from ....support import tiny_llama, with_cache

pytestmark = pytest.mark.usefixtures("one_thread")

AFFINE = {
    f"{preset} {part}": getattr(load_scheme(preset), part)
    for preset in ("octavo-8", "octavo-4", "octavo-3", "octavo-2", "kivi-4", "kivi-2", "lmdeploy-int8", "llamacpp-q4_1")
    for part in ("key", "value")
    if not getattr(load_scheme(preset), part).symmetric
}
AFFINE["gaussian"] = Codec(
    "int4", "token", dynamic=True, symmetric=False, scale_dtype="float16", levels="gaussian", rule="mse"
)


@pytest.mark.parametrize("value", [5.0, -5.0, 1e-3, 3e4])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4, 1e-3])
@pytest.mark.parametrize("name", AFFINE)
def test_they_lose_no_more_than_their_range_and_the_rounding_of_float16(name: str, value: float, spread: float) -> None:
    torch.manual_seed(0)
    values = value * (1 + spread * torch.rand(1, 2, 64, 64))
    store = CodeStore(AFFINE[name])
    store.append(values)
    assert ((store.decoded(0, 64) - values).abs() <= abs(value) * (2**-10 + spread)).all()


@pytest.mark.parametrize("preset", ["octavo-8", "octavo-4", "octavo-2", "kivi-4"])
def test_a_prompt_of_one_token_repeated_is_finite(preset: str) -> None:
    """Its K differ by the angle of RoPE alone, which is next to nothing in the last pairs of channels."""
    model = tiny_llama(head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 1e7})
    ids = torch.full((1, 300), 7)
    with torch.inference_mode():
        expected = model(ids).logits
        actual = prepare(model)(ids, **with_cache(QuantizedCache(model.config, preset))).logits
    assert actual.isfinite().all()
    assert (actual - expected).square().mean() < 0.1 * expected.square().mean()
