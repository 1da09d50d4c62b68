"""How large a cache is: bytes of a token, and bits of an element with everything counted."""

from transformers import PreTrainedConfig

from ..model_sizes import head_dim_of, kv_heads_of
from ..schemes.kv_scheme import Scheme, bits_per_element
from ..schemes.tensor_codec import Codec
from .sliding import sliding_windows

COUNTED_LENGTH = 2048
"""Tokens of a sequence over which sinks, windows and codebooks are spread when bits are counted."""


def _layer_schemes(config: PreTrainedConfig, scheme: Scheme) -> list[Scheme]:
    resolved = scheme.counted(config.num_hidden_layers, sliding_windows(config))
    return [resolved.of_layer(index) for index in range(config.num_hidden_layers)]


def _layer_token_bytes(config: PreTrainedConfig, scheme: Scheme, float_bytes: int) -> list[float]:
    """Bytes that one token takes in each layer."""
    head_dim, kv_heads = head_dim_of(config), kv_heads_of(config)

    def of_head(codec: Codec | None) -> float:
        return head_dim * float_bytes if codec is None else codec.token_bits(head_dim) / 8

    layers = _layer_schemes(config, scheme)
    return [kv_heads * (of_head(layer.key) + of_head(layer.value)) for layer in layers]


def kv_bytes_per_token(config: PreTrainedConfig, scheme: Scheme, float_bytes: int) -> int:
    """Bytes that one token takes in the cache, over all layers: codes, scales, zeros and outliers.

    Sinks and windows, of which there are no more in a longer sequence, are in `kv_bits_per_element`. A layer that
    slides counts as one that keeps all; `kv_bytes` says what it keeps.
    """
    return round(sum(_layer_token_bytes(config, scheme, float_bytes)))


def kv_bytes_of_layers(config: PreTrainedConfig, scheme: Scheme, length: int, crop_room: int = 0) -> list[float]:
    """Bytes that a sequence of `length` tokens takes in the cache of each layer, counted as in `kv_bytes`."""
    head_dim, kv_heads = head_dim_of(config), kv_heads_of(config)
    found = []
    for layer, window in zip(_layer_schemes(config, scheme), sliding_windows(config), strict=True):
        kept = length if window is None else min(length, window - 1 + crop_room)
        bits = bits_per_element(layer, kv_heads, head_dim, kept, crop_room)
        found.append(bits * 2 * kept * kv_heads * head_dim / 8)
    return found


def kv_bytes(config: PreTrainedConfig, scheme: Scheme, length: int, crop_room: int = 0) -> int:
    """Bytes that a sequence of `length` tokens takes in the cache, floats in 16 bits; layers that slide forget.

    These are the bytes in use. Storage grows in steps, so that up to a quarter more is allocated, and in a layer that
    slides a chunk of tokens (`Sliding`).

    Args:
        crop_room: as in `bits_per_element`; a layer that slides keeps so many tokens more than its window.
    """
    return round(sum(kv_bytes_of_layers(config, scheme, length, crop_room)))


def kept_kv_bytes(config: PreTrainedConfig, scheme: Scheme, length: int, float_bytes: int) -> int:
    """Bytes of those of `length` tokens that later ones need, counted as in `kv_bytes_per_token`.

    Of a layer that slides these are the newest of its window.
    """
    kept = [length if window is None else min(length, window - 1) for window in sliding_windows(config)]
    each = _layer_token_bytes(config, scheme, float_bytes)
    return round(sum(tokens * size for tokens, size in zip(kept, each, strict=True)))


def kv_bits_per_element(
    config: PreTrainedConfig, scheme: Scheme, length: int = COUNTED_LENGTH, crop_room: int = 0
) -> float:
    """Bits of an element of K and V in sequences of `length` tokens, everything counted, as a mean over the layers.

    Of elements that are stored: it does not count what layers that slide forget.

    Args:
        crop_room: as in `bits_per_element`: 0 counts the scheme alone, that of a `QuantizedCache` what it stores.
    """
    layers = _layer_schemes(config, scheme)
    head_dim, kv_heads = head_dim_of(config), kv_heads_of(config)
    return sum(bits_per_element(layer, kv_heads, head_dim, length, crop_room) for layer in layers) / len(layers)
