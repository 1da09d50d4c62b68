"""Attention on the CPU over codes whose scales vary along tokens and channels."""

import pytest
import torch

from .attention_calls import CODES, SCALES, assert_close, assert_lse_close, call_of, part_of

pytestmark = pytest.mark.usefixtures("build")


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize(("keys", "window"), [(45, 0), (700, 0), (1100, 77), (1100, 401), (5000, 0)])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", CODES)
def test_groups_of_tokens_with_scales_per_channel(
    dtype: torch.dtype, group: int, keys: int, window: int, queries: int
) -> None:
    """Blocks and windows begin anywhere in a group; zeros move with the group, so that they do not cancel."""
    call = call_of(dtype, dtype, queries, keys, width=64, batch=1, ratio=1 if queries == 40 else 5)
    call.window, call.key_group = window, group
    for part in ("scale", "zero"):
        form = "per channel and group of tokens"
        setattr(call, f"key_{part}", part_of(form, call, call.key, group, is_zero=part == "zero", half=True))
    output, lse = call.run_lse()
    expected, expected_lse = call.oracle_lse()
    assert_close(output, expected)
    assert_lse_close(lse, expected_lse)


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize(("keys", "window"), [(45, 0), (1100, 401), (3000, 0)])
@pytest.mark.parametrize(("width", "span"), [(64, 32), (96, 32), (128, 32), (256, 64), (160, 80)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_tokens_with_scales_per_group_of_channels(
    dtype: torch.dtype, width: int, span: int, keys: int, window: int, queries: int
) -> None:
    call = call_of(dtype, dtype, queries, keys, width=width, batch=1, ratio=1 if queries == 40 else 5)
    call.window = window
    for side in ("key", "value"):
        spread = torch.rand(1, 2, keys, width // span) + 0.5
        setattr(call, f"{side}_scale", (spread * SCALES[dtype]).half())
        setattr(call, f"{side}_zero", torch.randn(1, 2, keys, width // span) * 3)
    output, lse = call.run_lse()
    expected, expected_lse = call.oracle_lse()
    assert_close(output, expected)
    assert_lse_close(lse, expected_lse)


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", ["query", "key_scale", "key_zero", "value_scale", "value_zero"])
@pytest.mark.parametrize("queries", [1, 15, 40])
@pytest.mark.parametrize("form", ["per channel and group of tokens", "per token and group of channels"])
def test_grouped_codes_keep_what_is_no_number(form: str, queries: int, broken: str, what: float) -> None:
    call = call_of(torch.int8, torch.int8, queries, keys=300, width=128)
    call.key_group = 64 if form.startswith("per channel") else 1
    for part in ("scale", "zero"):
        for side in ("key", "value"):
            setattr(call, f"{side}_{part}", part_of(form, call, call.key, call.key_group, is_zero=part == "zero"))
    call.value_group = call.key_group
    getattr(call, broken)[..., 0, 3] = what
    output, lse = call.run_lse()
    expected, expected_lse = call.reference_lse()
    if broken.startswith("value"):  # whole numbers spread it over all channels of a row
        assert torch.equal(output.isfinite().all(dim=-1), expected.isfinite().all(dim=-1))
    else:
        assert torch.equal(output.isfinite(), expected.isfinite())
        assert torch.equal(lse.isfinite(), expected_lse.isfinite())
    assert not output.isfinite().all()
