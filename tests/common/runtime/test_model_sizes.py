"""Sizes that a config states are found out before anything is built by them."""

from typing import Any

import pytest

from octavo.common.errors import OctavoError
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.model_sizes import COUNTS, MOST_LAYERS, SIZES, check_sizes, check_sizes_stored, check_stated

from ...support import tiny_config


@pytest.mark.parametrize("name", [*SIZES, *COUNTS, "num_hidden_layers", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 10**18, 2.0, "3", True, [4], float("nan")], ids=str)
def test_no_model_has_such_a_size(name: str, value: Any) -> None:
    with pytest.raises(OctavoError, match=f"^here: {name} "):
        check_sizes("here", {"vocab_size": 7, name: value})


def test_sizes_may_be_left_out_and_other_numbers_are_finite() -> None:
    check_sizes("here", {"head_dim": None, "rms_norm_eps": 1e-6, "rope_parameters": {"factor": [1.0, 2.0]}})
    with pytest.raises(OctavoError, match="rope_parameters holds NaN or Infinity"):
        check_sizes("here", {"rope_parameters": {"factor": [1.0, float("inf")]}})


def test_sizes_that_the_weights_do_not_bear_out() -> None:
    check_sizes_stored("here", {"num_hidden_layers": 3, "head_dim": 128}, 3, 128)
    with pytest.raises(OctavoError, match="num_hidden_layers is 3, and the weights are those of 2 layers"):
        check_sizes_stored("here", {"num_hidden_layers": 3}, 2, 128)
    with pytest.raises(OctavoError, match="head_dim is 129, and no stored tensor is wider than 128"):
        check_sizes_stored("here", {"head_dim": 129}, 3, 128)


def test_numbers_that_transformers_would_make_up() -> None:
    stated = {"rms_norm_eps": 1e-5, "transformers_version": "5.23.0", "rope_parameters": {"rope_theta": 1e4}}
    check_stated("here", stated)
    check_stated("here", {**stated, "transformers_version": "4.31.0", "rope_parameters": None})
    check_stated("here", {**stated, "rope_parameters": None, "rope_theta": 1e4})
    for name, value in (("rms_norm_eps", None), ("rope_parameters", None), ("rope_parameters", {"a": {}})):
        with pytest.raises(OctavoError, match=r"^here: .* is missing.*; add it"):
            check_stated("here", {**stated, name: value})


@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", MOST_LAYERS + 1), ("head_dim", 10**9)])
def test_a_cache_of_a_config_that_no_model_has(name: str, value: int) -> None:
    config = tiny_config()
    setattr(config, name, value)
    with pytest.raises(OctavoError, match=f"{name} is {value}"):
        QuantizedCache(config)


def test_a_negative_epsilon_is_refused() -> None:
    with pytest.raises(OctavoError, match="rms_norm_eps is -1e-05"):
        check_sizes("config.json", {"rms_norm_eps": -1e-5})
