"""Rotations of q, k and v that attention does not notice: Hadamard matrices, and RoPE by the slot of a token."""

from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SMALLEST_TABLE = 2048
"""Rows of a table of angles."""
MOST_CONDITION = 1e5
"""Of a basis: the largest of its singular values by the smallest."""


@lru_cache(maxsize=16)
def _hadamard(width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    block = width & -width
    with torch.inference_mode(False):  # it outlives this pass, which may be one without gradients
        matrix = torch.ones((1, 1), device=device, dtype=dtype)
        while matrix.shape[0] < block:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
        return torch.block_diag(*[matrix / block**0.5] * (width // block))


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """A tensor in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """`[..., D]` times the orthonormal Hadamard matrix of D, which is its own inverse.

    Where D is no power of two, blocks of the largest power of two that divides it are rotated on their own.
    """
    if x.dtype == torch.float32:
        return functional.linear(x, _hadamard(x.shape[-1], x.device, x.dtype))  # the matrix is symmetric
    wide = at_least_float32(x)
    return (wide @ _hadamard(x.shape[-1], x.device, wide.dtype)).to(x.dtype)


def is_rotated(config: Any, index: int) -> bool:
    """Whether RoPE turns q and k of a layer, by what a config says of layers without it."""
    marks = getattr(config, "no_rope_layers", None)
    return not marks or bool(marks[index])


def _rope_parameters(config: Any, index: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters of RoPE in a layer, and what transformers has to be told to take these."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if not any(isinstance(part, dict) for part in parameters.values()):
        return parameters, {}
    layer_type = config.layer_types[index]
    return parameters[layer_type], {"layer_type": layer_type}


def layer_type_of(config: Any, index: int) -> tuple[str, ...]:
    """What a rotary embedding is told beside positions: the type of the layer where angles differ by it, or nothing."""
    return tuple(_rope_parameters(config, index)[1].values())


def rope_type(config: Any, index: int = 0) -> str:
    """How the angles of a layer are made, by transformers' names."""
    return _rope_parameters(config, index)[0].get("rope_type", "default")


def partial_rotary_factor(config: Any, index: int = 0) -> float:
    """The part of the channels of a head that RoPE turns in a layer, if it does so."""
    return float(_rope_parameters(config, index)[0].get("partial_rotary_factor", 1.0))


def steady_length(config: Any, index: int = 0) -> int | None:
    """Tokens up to which the angles of a layer are those of `rope_constants`, beyond which they are far from them.

    None where they are the same for all lengths, or near (dynamic scaling).
    """
    parameters = _rope_parameters(config, index)[0]
    return parameters["original_max_position_embeddings"] if parameters.get("rope_type") == "longrope" else None


def changes_with_length(config: Any, tokens: int) -> bool:
    """Whether the angles of a pass that ends with so many tokens depend on its length (dynamic scaling, LongRoPE)."""
    layers = range(config.num_hidden_layers) if getattr(config, "layer_types", None) else range(1)
    parameters = [_rope_parameters(config, index)[0] for index in layers]
    limits = [
        part.get("original_max_position_embeddings") or config.max_position_embeddings
        for part in parameters
        if part.get("rope_type") in ("dynamic", "longrope")
    ]
    return any(tokens > limit for limit in limits)


def rope_constants(config: Any, head_dim: int, index: int = 0) -> tuple[torch.Tensor, float]:
    """Angles per token of the rotary pairs of a layer, float32 `[R / 2]`, and the factor of its cos and sin.

    R of the D = `head_dim` channels of a head are turned, the first: none in layers without RoPE, all unless the config
    says that they are fewer. A model may use other angles at some positions (dynamic scaling): what is rotated back by
    the slot is rotated forth by it, so that they need only be near.
    """
    if not is_rotated(config, index):
        return torch.zeros(0), 1.0
    parameters, of_layer = _rope_parameters(config, index)
    kind = rope_type(config, index)
    if kind in ROPE_INIT_FUNCTIONS:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **of_layer)
        return frequencies.float(), float(factor)
    base, turned = parameters.get("rope_theta", 10000.0), int(head_dim * partial_rotary_factor(config, index))
    return base ** -(torch.arange(0, turned, 2, dtype=torch.float32) / turned), 1.0


class Basis:
    """The basis of each KV head in which K or V is stored, and what undoes it.

    Args:
        matrix: float32 `[G, D, D]`: x becomes x M.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():  # they outlive this pass
            wide = matrix.detach().double().cpu()
            self._matrix, self._inverse = matrix.detach().float(), torch.linalg.inv_ex(wide)[0].float()
            self.is_sound = bool((torch.linalg.cond(wide) < MOST_CONDITION).all())

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, G, S, D]` in the basis, in the dtype of x."""
        self._move(x.device)
        wide = at_least_float32(x)
        return (wide @ self._matrix.to(wide.dtype)).to(x.dtype)

    def inverse(self, device: torch.device) -> torch.Tensor:
        """`[G, D, D]`."""
        self._move(device)
        return self._inverse

    def _move(self, device: torch.device) -> None:
        if self._matrix.device != device or self._inverse.device != device:
            with torch.inference_mode(False):
                self._matrix, self._inverse = self._matrix.to(device), self._inverse.to(device)


_BASES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def basis_of(matrix: torch.Tensor) -> Basis:
    """The basis of matrices `[G, D, D]`, worked out once for all caches of a model."""
    version = 0 if matrix.is_inference() else matrix._version
    known = _BASES.get(matrix)
    if known is None or known[0] != version:
        known = _BASES[matrix] = version, Basis(matrix)
    return known[1]


def by_kv_head(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """`[B, H, Q, D]` times the matrix `[G, D, D]` of the KV head of each head, in the dtype of x."""
    heads = at_least_float32(x).unflatten(1, (matrix.shape[0], -1))
    return (heads @ matrix[:, None].to(heads.dtype)).flatten(1, 2).to(x.dtype)


def positions_made_for(length: int) -> int:
    """Rows of a table that is made for so many positions: it doubles, so that it is made anew seldom."""
    return max(SMALLEST_TABLE, 1 << (length - 1).bit_length())


class SlotTable:
    """cos and sin of the angles of all slots up to one, float32, which grows as it is asked to.

    Args:
        frequencies: angles per slot of the rotary pairs, R / 2 of them.
    """

    def __init__(self, frequencies: tuple[float, ...]) -> None:
        self._frequencies = torch.tensor(frequencies, dtype=torch.float32, device="cpu")
        self._rows: dict[torch.device, torch.Tensor] = {}

    def rows(self, length: int, device: torch.device) -> torch.Tensor:
        """`[P, R]` with P at least `length`: cos of the R / 2 pairs and then their sin."""
        rows = self._rows.get(device)
        if rows is None or rows.shape[0] < length:
            with torch.inference_mode(False):  # it outlives this pass
                slots = torch.arange(positions_made_for(length), device=device, dtype=torch.float32)
                angles = slots[:, None] * self._frequencies.to(device)
                rows = self._rows[device] = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return rows


@lru_cache(maxsize=16)
def slot_table(frequencies: tuple[float, ...]) -> SlotTable:
    """The table of some frequencies, one for all layers and caches that have these."""
    return SlotTable(frequencies)


def turned(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`[..., D]` with its first R channels, as rotary pairs, turned by angles.

    Args:
        rows: cos of the R / 2 angles and then their sin, `[..., R]`; broadcast against `x`.
    """
    cos, sin = rows.chunk(2, dim=-1)
    count = rows.shape[-1]
    first, second = x[..., :count].chunk(2, dim=-1)
    found = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    if count == x.shape[-1]:
        return found
    return torch.cat((found, x[..., count:].expand(*found.shape[:-1], -1)), dim=-1)


def rotated_by_slot(x: torch.Tensor, frequencies: torch.Tensor, start: int, backwards: bool = False) -> torch.Tensor:
    """`[B, G, S, D]` float32 rotated by RoPE as if its tokens stood at the positions from `start` on, or back.

    Args:
        frequencies: `[R / 2]`; channels behind the first R stay as they are.
    """
    slots = torch.arange(start, start + x.shape[2], device=x.device, dtype=torch.float32)
    angles = slots[:, None] * frequencies
    return turned(x, torch.cat((angles.cos(), -angles.sin() if backwards else angles.sin()), dim=-1))
