"""Ranges of inputs: inside what was seen, and of less error than all of it."""

import pytest
import torch

from octavo.common.convert.weights.input_range import input_range, outlier_score
from octavo.common.runtime.schemes.linear_scheme import ACT_METHODS

from .test_quantize import seen

pytestmark = pytest.mark.usefixtures("one_thread")


def squared_error(values: torch.Tensor, low: float, high: float) -> float:
    """Of int8 codes over a range, in float64."""
    scale = max((high - low) / 255, 1e-12)
    offset = round(-low / scale) - 128
    codes = (values.double() / scale + offset).round().clamp(-128, 127)
    return float(((codes - offset) * scale - values.double()).square().sum())


INPUTS = {
    "normal": lambda g: torch.randn(20_000, generator=g),
    "heavy tails": lambda g: torch.randn(20_000, generator=g) ** 3,
    "one outlier": lambda g: torch.cat([torch.randn(20_000, generator=g), torch.tensor([40.0])]),
    "positive": lambda g: torch.rand(20_000, generator=g) ** 4,
    "negative": lambda g: -torch.rand(20_000, generator=g),
    "constant": lambda g: torch.full((100,), 0.3),
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("act_method", ACT_METHODS)
def test_a_range_is_inside_all_that_was_seen(act_method: str, inputs: str) -> None:
    values = INPUTS[inputs](torch.Generator().manual_seed(0)).view(-1, 1)
    found = seen(values)
    all_low, all_high = input_range(found, "minmax")
    assert (all_low, all_high) == (min(0.0, float(values.min())), max(0.0, float(values.max())))
    low, high = input_range(found, act_method, torch.ones(1, 1))
    assert all_low <= low <= 0 <= high <= all_high
    if act_method in ("histogram", "mse"):
        assert squared_error(values, low, high) <= squared_error(values, all_low, all_high) * 1.01
        if inputs == "heavy tails" or (inputs, act_method) == ("one outlier", "histogram"):  # "mse" sees some rows
            assert squared_error(values, low, high) < 0.99 * squared_error(values, all_low, all_high)
    if act_method == "percentile" and inputs == "normal":
        beyond = ((values < low) | (values > high)).float().mean()
        assert 0 < beyond <= 1.1e-4


def test_the_automatic_method_keeps_extreme_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    mild = torch.cat([torch.randn(20_000, generator=generator), torch.tensor([40.0])])
    extreme = torch.cat([torch.randn(20_000, generator=generator), torch.tensor([80.0])])
    for values, same_as in ((mild, "histogram"), (extreme, "minmax")):
        found = seen(values[:, None])
        assert input_range(found, "auto") == input_range(found, same_as)
    assert outlier_score(seen(mild[:, None])) < 50 < outlier_score(seen(extreme[:, None]))
    assert outlier_score(seen(torch.zeros(5, 1))) == 0


def test_extremes_that_rows_lack_are_not_forgotten() -> None:
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    x[-1, 2] = 1e4
    for act_method in ("histogram", "mse"):
        assert input_range(seen(x, 1000), act_method, torch.eye(4))[1] > 5e3
        assert input_range(seen(x, 0), act_method, torch.eye(4))[1] > 5e3


def test_the_output_decides_what_a_channel_counts() -> None:
    """Outliers of a channel that the weight ignores are clipped, by "mse" alone."""
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 30
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    weight[:, 3] = 0
    assert input_range(seen(x), "mse", weight)[1] < 6 < 30 < input_range(seen(x), "histogram")[1]
