"""Observers: what calibration keeps of a model's activations."""

import pytest
import torch

from octavo.common.observe import BINS, InputObserver, calibrate

from ..support import random_ids, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_histogram_that_doubled_equals_a_direct_one() -> None:
    """Values at the centres of the finest bins, so that no rounding decides where one falls."""
    generator = torch.Generator().manual_seed(0)
    fine = 2.0 / BINS
    batches = [
        (torch.randint(-int(reach / fine), int(reach / fine), (500,), generator=generator) + 0.5) * fine
        for reach in (1, 0.5, 3, 8, 2)
    ]
    observer, direct = InputObserver(), InputObserver()
    observer.limit = 1.0
    for batch in batches:
        observer(batch)
    assert observer.limit == 8.0
    direct.limit = 8.0
    direct(torch.cat(batches))
    assert torch.equal(observer.histogram, direct.histogram)
    assert observer.histogram.sum() == 2500 == observer.count


def test_range_spread_and_count() -> None:
    observer = InputObserver()
    batches = [torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * (seed + 1) for seed in range(4)]
    for batch in batches:
        observer(batch)
    values = torch.cat([batch.flatten() for batch in batches]).double()
    low, high, spread, limit = observer.tensors()["range"].tolist()
    assert low == float(values.min()) and high == float(values.max())
    assert spread == pytest.approx(float(values.square().mean().sqrt()), rel=1e-5)
    assert limit >= max(-low, high)
    assert observer.tensors()["histogram"].sum() == values.numel()


def test_a_range_always_holds_zero() -> None:
    observer = InputObserver()
    observer(torch.tensor([3.0, 5.0]))
    assert observer.tensors()["range"][:2].tolist() == [0.0, 5.0]


def test_zeros_and_nan() -> None:
    observer = InputObserver()
    observer(torch.zeros(10))
    assert observer.tensors()["range"].tolist() == [0, 0, 0, 0]
    observer(torch.tensor([1.0, float("nan")]))
    assert not torch.isfinite(observer.tensors()["range"]).all()


def test_calibration_sees_what_the_layers_see_and_leaves_the_model_alone() -> None:
    model = tiny_llama()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
        for name in names
    ]
    samples = [{"input_ids": random_ids(1, length, seed=length)} for length in (20, 33)]
    with torch.inference_mode():
        before = [model(**sample).logits for sample in samples]
    for hook in hooks:
        hook.remove()
    implementation = model.config._attn_implementation
    statistics = calibrate(model, names, samples)
    for name in names:
        values = torch.cat([part.flatten() for part in inputs[name]])
        low, high, _, _ = statistics.tensors[f"linears.{name}.range"].tolist()
        assert low == pytest.approx(min(0.0, float(values.min())), rel=1e-4), name
        assert high == pytest.approx(max(0.0, float(values.max())), rel=1e-4), name
        assert statistics.tensors[f"linears.{name}.histogram"].sum() == values.numel()
    assert statistics.metadata == {"model_type": "llama", "num_hidden_layers": "3", "tokens": "53"}
    assert model.config._attn_implementation == implementation
    assert not any(hasattr(module, "attention_observer") or module._forward_pre_hooks for module in model.modules())
    with torch.inference_mode():
        assert all(torch.equal(model(**s).logits, b) for s, b in zip(samples, before, strict=True))


def test_a_failed_calibration_leaves_the_model_alone() -> None:
    model = tiny_llama()
    with pytest.raises(IndexError):
        calibrate(model, ["lm_head"], [{"input_ids": torch.tensor([[100_000]])}])
    assert model.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "attention_observer") or module._forward_pre_hooks for module in model.modules())


def test_v_and_k_of_attention() -> None:
    model = tiny_llama()
    seen: dict[str, torch.Tensor] = {}
    attention = model.model.layers[1].self_attn
    attention.v_proj.register_forward_hook(lambda _, args, output: seen.update(v=output))
    attention.k_proj.register_forward_hook(lambda _, args, output: seen.update(k=output))
    statistics = calibrate(model, [], [{"input_ids": random_ids(1, 30)}])
    v, k = (seen[name].view(30, 2, 16) for name in "vk")
    torch.testing.assert_close(statistics.tensors["layers.1.v.low"], v.amin(0))
    torch.testing.assert_close(statistics.tensors["layers.1.v.high"], v.amax(0))
    radius = torch.hypot(k[..., :8], k[..., 8:]).amax(0)
    torch.testing.assert_close(statistics.tensors["layers.1.k.radius"], radius, atol=1e-4, rtol=1e-4)
    assert statistics.tensors["layers.1.q.radius"].shape == (4, 8)
