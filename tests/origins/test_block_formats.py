"""NVFP4, MXFP4 and MXFP8, LMDeploy's policy 42 and ONNX Runtime's scales: presets on worked examples of their formulas.

`tests/engines` runs vLLM's and torchao's references and LMDeploy's and ONNX Runtime's kernels beside them.
"""

import pytest
import torch

from octavo.common.runtime.cache.code_store import CodeStore
from octavo.common.runtime.rotary import hadamard
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.schemes.tensor_codec import Codec
from octavo.common.runtime.static_scales import static_scale

pytestmark = pytest.mark.usefixtures("one_thread")


def stored(codec: Codec, values: torch.Tensor) -> tuple[CodeStore, torch.Tensor]:
    """A store of values `[n]` of one token, and what it holds of them."""
    store = CodeStore(codec)
    store.append(values.view(1, 1, 1, -1))
    return store, store.decoded(0, 1).flatten()


def test_nvfp4_by_hand() -> None:
    """A block of 16 up to 9 has the scale 1.5, one up to 0.75 the scale 0.125, one of 1e-3 the scale 0 and so nothing.

    Of two values as near, the one whose mantissa is even: 0.25 becomes 0, 0.75 is 1, and 2.5 is 2 in units of a scale.
    """
    units = torch.tensor([6, -6, 0.25, 0.75, -1.25, 1.75, 2.5, 3.5, 5, -5, 0.3, -0.2, 3, 1, 1.5, 0.0])
    codes = torch.tensor([6, -6, 0, 1, -1, 2, 2, 4, 4, -4, 0.5, 0, 3, 1, 1.5, 0.0])
    values = torch.cat((units * 1.5, units * 0.125, torch.full((16,), 1e-3)))
    codec = load_scheme("nvfp4").key
    store, found = stored(codec, values)
    assert torch.equal(found, torch.cat((codes * 1.5, codes * 0.125, torch.zeros(16))))
    assert store._scale.dtype == torch.float8_e4m3fn and store._scale[0, 0, 0].tolist() == [1.5, 0.125, 0]
    assert codec.token_bits(128) == 4.5 * 128 and codec == load_scheme("nvfp4").value


def test_mxfp4_by_hand() -> None:
    """Of up to 7, floor(log2 7) - 2 = 0: what is beyond 6 is 6. Of up to 0.5, -1 - 2 = -3: 0.5 is the code 4."""
    first = torch.tensor([7.0, -6.5, 5.0, 0.75] + [0.0] * 28)
    codec = load_scheme("mxfp4").key
    store, found = stored(codec, torch.cat((first, torch.tensor([0.5, -0.4375] + [0.0] * 30))))
    assert store._scale[0, 0, 0].tolist() == [127, 124]
    assert found[:4].tolist() == [6, -6, 4, 1] and found[32:34].tolist() == [0.5, -0.5]
    assert codec.token_bits(128) == 4.25 * 128


def test_mxfp8_by_hand() -> None:
    """Of up to 1.9, floor(log2 1.9) - 8 = -8: it is beyond 448 / 256, and becomes that; 1.0625 is between two codes."""
    store, found = stored(load_scheme("mxfp8").key, torch.tensor([1.9, -1.75, 1.0625, 1.1875] + [0.0] * 28))
    assert store._scale[0, 0, 0].tolist() == [127 - 8]
    assert found[:4].tolist() == [1.75, -1.75, 1.0, 1.25]
    assert load_scheme("mxfp8").value.token_bits(128) == 8.25 * 128


def test_a_block_of_zeros_is_one() -> None:
    for name in ("nvfp4", "mxfp4", "mxfp8"):
        assert torch.equal(stored(load_scheme(name).key, torch.zeros(64))[1], torch.zeros(64))


def test_lmdeploys_keys_by_their_formula() -> None:
    """u = x / |x|, c the nearest of 8 levels / sqrt(D), x = |x| (c + n sign(u - c)), n = |u - c| / sqrt(D).

    Source: LMDeploy 0.18, kernels/cuda/fill_kv_cache.py and flatten_kv_cache.py.
    """
    width, scheme = 128, load_scheme("turboquant-lmdeploy")
    x = hadamard(torch.randn((200, width), generator=torch.Generator().manual_seed(0)) * 3)
    positive = torch.tensor([0.2450942, 0.7560052, 1.3439093, 2.1519456])
    levels = torch.cat((-positive.flip(0), positive)) / width**0.5
    norm = x.norm(dim=-1, keepdim=True)
    u = x / norm
    c = levels[(u[..., None] - levels).abs().argmin(dim=-1)]
    second = (u - c).norm(dim=-1, keepdim=True) / width**0.5
    expected = norm * (c + second * torch.where(u >= c, 1.0, -1.0))
    store = CodeStore(scheme.key)
    store.append(x[None, None])
    found = store.decoded(0, 200)[0, 0]
    assert ((found - expected).abs() <= 2e-3 * norm / width**0.5).float().mean() > 0.998
    plain = CodeStore(load_scheme("turboquant-mse-3").key)
    plain.append(x[None, None])
    without = plain.decoded(0, 200)[0, 0]
    assert (found - x).square().mean() < 0.5 * (without - x).square().mean(), "what the signs are for"
    assert scheme.key.token_bits(width) == 4 * width + 2 * 16 and scheme.value.token_bits(width) == 2 * width + 16


def test_onnx_runtimes_scales_by_hand() -> None:
    """scale = largest / 128, code = round(x / scale) with halves to even, from -128 to 127: 1 becomes 127 / 128."""
    codec = load_scheme("ort-int8-channel").key
    scale, zero = static_scale(codec, torch.tensor([[-1.0, -3.0]]), torch.tensor([[0.5, 4.0]]))
    assert zero is None and scale.flatten().tolist() == [1 / 128, 4 / 128]
    store = CodeStore(codec, (scale, None))
    values = torch.tensor([[-1.0, 4.0], [1.0, -4.0], [2.5 / 128, 0.0], [-3.5 / 128, 9.0]])
    assert store.append(values[None, None]).codes[0, 0].tolist() == [[-128, 127], [127, -128], [2, 0], [-4, 127]]
    assert not load_scheme("ort-int8-channel").fold_bias, "the engine counts biases in"
