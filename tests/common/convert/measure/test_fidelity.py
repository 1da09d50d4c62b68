"""Fidelity: KL, perplexity and agreement, against their definitions."""

import math

import pytest
import torch

from octavo.common.convert.measure.fidelity import ROWS, compare, windows


def table(seed: int, tokens: int, vocabulary: int = 11) -> torch.Tensor:
    return torch.randn((1, tokens, vocabulary), generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("tokens", [2, 9, ROWS, ROWS + 1, 2 * ROWS + 5])
def test_means_over_all_predicted_tokens(tokens: int) -> None:
    samples = [torch.randint(0, 11, (1, length), generator=torch.Generator().manual_seed(0)) for length in (tokens, 7)]
    expected, actual = ([table(seed + n, s.shape[1]) for n, s in enumerate(samples)] for seed in (1, 50))
    count, kl, loss, float_loss, agreed = 0, 0.0, 0.0, 0.0, 0
    for ids, e, a in zip(samples, expected, actual, strict=True):
        for position in range(ids.shape[1] - 1):
            p, q = e[0, position].double().softmax(0), a[0, position].double().softmax(0)
            target = int(ids[0, position + 1])
            kl += float((p * (p / q).log()).sum())
            loss, float_loss = loss - math.log(q[target]), float_loss - math.log(p[target])
            agreed += int(p.argmax() == q.argmax())
            count += 1
    given, measured = iter(expected), iter(actual)
    found = compare(lambda _: next(given), lambda _: next(measured), samples)
    assert found.tokens == count
    assert found.kl == pytest.approx(kl / count)
    assert found.perplexity == pytest.approx(math.exp(loss / count))
    assert found.float_perplexity == pytest.approx(math.exp(float_loss / count))
    assert found.top1 == pytest.approx(agreed / count)


def test_a_model_is_no_distance_from_itself() -> None:
    logits = table(0, 40)
    found = compare(lambda _: logits, lambda _: logits, [torch.zeros((1, 40), dtype=torch.long)])
    assert found.kl == 0 and found.top1 == 1 and found.perplexity == found.float_perplexity


def test_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="shorter than two tokens"):
        compare(lambda ids: table(0, 1), lambda ids: table(0, 1), [torch.zeros((1, 1), dtype=torch.long)])


def test_windows_are_spread_over_the_text() -> None:
    ids = torch.arange(100)
    assert [w[0].tolist() for w in windows(ids, 10, 3)] == [list(range(s, s + 10)) for s in (0, 33, 66)]
    assert windows(ids, 100, 1)[0].shape == (1, 100)
    with pytest.raises(ValueError, match="100 tokens"):
        windows(ids, 51, 2)
