"""What follows from the definition of a call: flat arguments, their schema, and what signatures are refused."""

from typing import Any, NamedTuple

import pytest
import torch

from octavo.ops.shared.call_form import CallForm


class Side(NamedTuple):
    values: torch.Tensor
    scale: torch.Tensor | None = None
    group: int = 1


class Options(NamedTuple):
    causal: bool = True
    scale: float = 0.5


class Sample(NamedTuple):
    x: torch.Tensor
    left: Side
    factor: float
    options: Options = Options(scale=2.0)


FORM = CallForm(Sample, nameless=("values",))
X, LEFT, SCALE = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
CALL = Sample(X, Side(LEFT, SCALE, 4), 3.0)


def test_what_every_call_gives_comes_first_and_defaults_are_those_of_the_definition() -> None:
    assert list(FORM.signature.parameters) == [
        "x", "left", "factor", "left_scale", "left_group", "options_causal", "options_scale",
    ]  # fmt: skip
    assert FORM.schema("sample", tuple[torch.Tensor, torch.Tensor]) == (
        "sample(Tensor x, Tensor left, float factor, Tensor? left_scale=None, int left_group=1, "
        "bool options_causal=True, float options_scale=2.0) -> (Tensor, Tensor)"
    )


def test_a_call_comes_back_from_its_flat_arguments() -> None:
    flat = FORM.flat(CALL)
    assert flat == (X, LEFT, 3.0, SCALE, 4, True, 2.0)
    for call in (
        FORM.of(*flat),
        FORM.of(*flat[:5]),
        FORM.of(x=X, left=LEFT, factor=3.0, left_scale=SCALE, left_group=4),
    ):
        assert call == CALL and type(call) is Sample and type(call.left) is Side and type(call.options) is Options


def test_a_compiled_function_flattens_a_call() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def scaled(x: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        x, left, factor, *_ = FORM.flat(Sample(x, Side(left), 3.0))
        return x + left * factor

    assert torch.equal(scaled(X, LEFT), X + 3 * LEFT)


def test_unknown_and_missing_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="right"):
        FORM.of(x=X, left=LEFT, factor=1.0, right=X)
    with pytest.raises(TypeError, match="factor"):
        FORM.of(x=X, left=LEFT)


@pytest.mark.parametrize("given", range(3, 8))
def test_a_kernel_gets_calls_of_which_torch_leaves_out_the_last_defaults(given: int) -> None:
    flat = FORM.flat(Sample(X, Side(LEFT), 3.0))
    assert FORM.flattened(lambda call: call)(*flat[:given]) == Sample(X, Side(LEFT), 3.0)


def test_a_function_of_another_signature_is_refused() -> None:
    def good(call: Sample) -> torch.Tensor: ...

    def returns_another(call: Sample) -> None: ...

    def takes_more(call: Sample, more: int = 0) -> torch.Tensor: ...

    def takes_another(call: Side) -> torch.Tensor: ...

    def says_nothing(call) -> Any: ...  # noqa: ANN001

    FORM.check(good, torch.Tensor)
    for wrong in (returns_another, takes_more, takes_another, says_nothing):
        with pytest.raises(TypeError, match=f"{wrong.__name__} must be of"):
            FORM.check(wrong, torch.Tensor)
