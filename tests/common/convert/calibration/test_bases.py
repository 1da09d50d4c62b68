"""Means and bases from calibration: what they are, and that codes lose less in them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from octavo.common.convert.calibration import bases
from octavo.common.convert.calibration.bases import NEWEST, SINKS, find_bases, joined
from octavo.common.convert.calibration.observe import attention_replaced, calibrate
from octavo.common.convert.calibration.whole import calibrate_whole
from octavo.common.errors import OctavoError
from octavo.common.runtime.rotary import hadamard, rope_constants, rotated_by_slot
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.static_scales import Statistics, load_statistics, scales_of

from ....support import random_ids, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = random_ids(1, 90)
SAMPLES = [{"input_ids": IDS[:, :40]}, {"input_ids": IDS[:, 40:]}]


def by_definition(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean of K of the first layer, A and B, `[G, D]` and `[G, D, D]`, term by term in float64.

    A and B are of the text where it stands, and of the same moved along all positions of the model.
    """
    states: list[torch.Tensor] = []
    first = model.model.layers[0].self_attn

    def see(*parts: Any) -> None:
        states.extend(parts)

    def attend(module: torch.nn.Module, *parts: Any, scaling: float, **kwargs: Any) -> Any:
        if module is first:
            module.seen(*parts[:3], scaling)
        return sdpa_attention_forward(module, *parts, scaling=scaling, **kwargs)

    with (
        torch.inference_mode(),
        attention_replaced(model, [("", first)], "octavo_test", attend, "seen", lambda *_: see),
    ):
        model.model(IDS)
    query, key, value = (part[0].double() for part in states[:3])
    frequencies, _ = rope_constants(model.config, key.shape[-1])
    before = rotated_by_slot(key[None].float(), frequencies, 0, backwards=True)[0].double()
    mean = before[:, SINKS:].mean(dim=1)
    rest = key - rotated_by_slot(mean[None, :, None].float().expand_as(key[None]), frequencies, 0)[0].double()
    reads = len(query) // len(key)
    places = range(0, min(bases.POSITIONS, model.config.max_position_embeddings), bases.TEXT_LENGTH)

    def moved(x: torch.Tensor) -> torch.Tensor:
        """`[heads, S, D]` at all places, `[heads, S, N, D]`."""
        still = rotated_by_slot(x[None].float(), frequencies, 0, backwards=True)
        return torch.stack([rotated_by_slot(still, frequencies, place)[0].double() for place in places], dim=2)

    queries, rests = moved(query), moved(rest)
    metric, spread = (torch.zeros(len(key), *[key.shape[-1]] * 2, dtype=torch.float64) for _ in range(2))
    for head, q in enumerate(query):
        group = head // reads
        for t in range(len(q)):
            share = torch.softmax(key[group, : t + 1] @ q[t] * states[3], dim=0)
            output = share @ value[group, : t + 1]
            for j in range(SINKS, t + 1 - NEWEST):
                weight = share[j] ** 2 * (value[group, j] - output).square().sum()
                metric[group] += weight * queries[head, t].T @ queries[head, t]
                spread[group] += weight * q[t].square().sum() * rests[group, j].T @ rests[group, j]
    return mean, metric, spread


def test_bases_are_those_of_the_definition() -> None:
    model = tiny_llama()
    mean, metric, spread = by_definition(model)
    found = find_bases(model, SAMPLES, Statistics({}, {})).tensors
    torch.testing.assert_close(found["layers.0.k.mean"], mean.float(), atol=1e-5, rtol=1e-4)
    basis = found["layers.0.k.balanced"].double()
    eye = torch.eye(basis.shape[1], dtype=torch.float64) * bases.SMALLEST_PART
    metric, spread = (
        moments / moments.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] + eye for moments in (metric, spread)
    )
    inverse = torch.linalg.inv(basis)
    stored, asked = basis.transpose(1, 2) @ spread @ basis, inverse @ metric @ inverse.transpose(1, 2)
    unit, diagonal = stored[:, :1, :1] / asked[:, :1, :1], stored.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(stored, asked * unit, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(diagonal, diagonal.mean(dim=1, keepdim=True).expand_as(diagonal), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("turned", (8, 4, 0))
def test_moments_are_means_over_texts_that_move(turned: int) -> None:
    """Term by term, with all of 8 channels turned, half of them and none."""
    frequencies = 10.0 ** -torch.arange(0, 4, 8 / max(turned, 1))[: turned // 2]
    x = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    found = bases._Moments(None, frequencies, 1.0, positions=3000)._moved((x.transpose(1, 2) @ x).double())
    expected = torch.zeros(2, 8, 8)
    for place in (0, 1024, 2048):
        for token in x.transpose(0, 1):
            moved = rotated_by_slot(token[None, :, None], frequencies, place)[0, :, 0]
            expected += moved[:, :, None] * moved[:, None, :] / 3
    torch.testing.assert_close(found.float(), expected, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("longest, places", ((16384, 8), (1500, 2), (500, 1)))
def test_texts_move_below_the_positions_of_a_model(longest: int, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    moved = bases.turned
    monkeypatch.setattr(bases, "turned", lambda x, rows: counts.append(len(rows)) or moved(x, rows))
    find_bases(tiny_llama(max_position_embeddings=longest), SAMPLES, Statistics({}, {}))
    assert set(counts) == {places}


def test_the_basis_loses_less_than_a_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -3, 16, dtype=torch.float64)
    turns = torch.linalg.qr(torch.randn(2, 16, 16, generator=generator, dtype=torch.float64))[0]
    queries, keys = ((turn * sizes) @ turn.T for turn in turns)
    basis = bases._balanced(queries[None], keys[None])[0]

    def error(matrix: torch.Tensor) -> torch.Tensor:
        """Of scores, where that of what is stored is its mean square, alike in all channels."""
        inverse = torch.linalg.inv(matrix)
        return (inverse @ queries @ inverse.T).trace() * (matrix.T @ keys @ matrix).trace() / 16

    assert error(basis) < 0.5 * error(hadamard(torch.eye(16, dtype=torch.float64)))


def test_oscar_is_a_rotation() -> None:
    found = find_bases(tiny_llama(), SAMPLES, Statistics({}, {})).tensors
    for name in ("layers.1.k.oscar", "layers.1.v.oscar"):
        basis = found[name]
        torch.testing.assert_close(basis @ basis.transpose(1, 2), torch.eye(basis.shape[1]).expand_as(basis))


def test_statistics_with_bases_come_back_and_serve(tmp_path: Path) -> None:
    model, scheme = tiny_llama(), load_scheme("octavo-2c")
    calibrate_whole(model, SAMPLES, [scheme]).save(tmp_path / "s")
    found = load_statistics(tmp_path / "s")
    found.check_model(model.config)
    scales = scales_of(scheme, found)
    assert scales[0].key_mean.shape == (2, 1, 16) and scales[0].key_basis.shape == (2, 16, 16)
    assert scales[0].value_basis is None
    plain = calibrate(model, [], SAMPLES)
    with pytest.raises(OctavoError, match="hold no bases"):
        scales_of(dataclasses.replace(scheme, sharp_share=0.0), plain)
    broken = Statistics(found.tensors | {"layers.0.k.balanced": torch.zeros(2, 16, 16)}, found.metadata)
    broken.save(tmp_path / "t")
    with pytest.raises(OctavoError, match=r"layers\.0\.k\.balanced holds no bases that can be undone"):
        load_statistics(tmp_path / "t")


def test_texts_are_joined_to_long_ones() -> None:
    samples = [{"input_ids": random_ids(1, length, seed=length)} for length in (70, 30, 101)]
    texts = joined(samples, length=80)
    assert [text.shape[1] for text in texts] == [80, 80], "a rest is left out"
    assert torch.equal(torch.cat(texts, dim=1), torch.cat([part["input_ids"] for part in samples], dim=1)[:, :160])
    with pytest.raises(OctavoError, match="need calibration texts of at least 64 tokens"):
        joined([{"input_ids": random_ids(1, 20)}])
