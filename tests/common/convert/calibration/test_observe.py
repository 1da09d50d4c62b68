"""Observers: what calibration keeps of a model's activations."""

import pytest
import torch

from octavo.common.convert.calibration import observe
from octavo.common.convert.calibration.observe import InputObserver, calibrate

from ....support import random_ids, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


def test_extremes_and_means_of_each_channel() -> None:
    observer = InputObserver()
    batches = [torch.randn(1, n, 40, generator=torch.Generator().manual_seed(n)) * n for n in range(1, 5)]
    for batch in batches:
        observer(batch)
    values, found = torch.cat([batch[0] for batch in batches]), observer.inputs()
    assert torch.equal(found.low, values.amin(0)) and torch.equal(found.high, values.amax(0))
    torch.testing.assert_close(found.mean_abs, values.abs().mean(0))
    torch.testing.assert_close(found.mean_square, values.square().mean(0))
    assert torch.equal(found.rows, values) and observer.count == 10


def test_rows_are_kept_evenly_once_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "MOST_BYTES", 40 * 4 * 2)
    observer = InputObserver()
    rows = torch.arange(300.0)[:, None].expand(-1, 2)
    for batch in rows.split([7, 100, 1, 92, 100]):
        observer(batch)
    kept = observer.inputs().rows[:, 0]
    stride = int(kept[1])
    assert stride == 8 and torch.equal(kept, torch.arange(0, 300.0, stride)), "as if they had come at once"
    assert observer.inputs().high.tolist() == [299.0, 299.0], "extremes are of all"


def test_hessians_are_of_all_tokens_and_kept_if_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "MOST_BYTES", 50 * 4 * 4)
    observer, rows = InputObserver(keeps_hessian=True), torch.randn(300, 4)
    for batch in rows.split(25):
        observer(batch)
    torch.testing.assert_close(observer.inputs().hessian, rows.T @ rows / 300)
    plain = InputObserver()
    plain(rows)
    assert plain.inputs().hessian is None


def test_nan_is_kept() -> None:
    observer = InputObserver()
    observer(torch.zeros(3, 2))
    observer(torch.tensor([[1.0, float("nan")]]))
    assert observer.inputs().high.isnan().tolist() == [False, True]


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
        values = torch.cat([part[0] for part in inputs[name]])
        torch.testing.assert_close(statistics.tensors[f"linears.{name}.low"], values.amin(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.tensors[f"linears.{name}.high"], values.amax(0), rtol=1e-4, atol=1e-5)
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
