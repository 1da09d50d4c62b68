"""How large a cache is: bytes of a token, and bits of an element with everything counted."""

from transformers import PreTrainedConfig

from ..model_sizes import head_dim_of, kv_heads_of
from ..schemes.kv_scheme import Scheme, bits_per_element

COUNTED_LENGTH = 2048
"""Tokens of a sequence over which sinks, windows and codebooks are spread when bits are counted."""


def kv_bytes_per_token(config: PreTrainedConfig, scheme: Scheme, float_bytes: int) -> int:
    """Bytes that one token takes in the cache, over all layers: codes, scales, zeros and outliers.

    Sinks and windows, of which there are no more in a longer sequence, are in `kv_bits_per_element`.
    """
    width, heads = head_dim_of(config), kv_heads_of(config)
    total = 0.0
    for index in range(config.num_hidden_layers):
        part = scheme.of_layer(index)
        for codec in (part.key, part.value):
            each = width * float_bytes if codec is None else codec.token_bits(width) / 8
            total += heads * each
    return round(total)


def kv_bits_per_element(
    config: PreTrainedConfig, scheme: Scheme, length: int = COUNTED_LENGTH, crop_room: int = 0
) -> float:
    """Bits of an element of K and V in sequences of `length` tokens, everything counted, as a mean over the layers.

    Args:
        crop_room: as in `bits_per_element`: 0 counts the scheme alone, that of a `QuantizedCache` what it stores.
    """
    layers = [scheme.of_layer(index) for index in range(config.num_hidden_layers)]
    width, heads = head_dim_of(config), kv_heads_of(config)
    return sum(bits_per_element(layer, heads, width, length, crop_room) for layer in layers) / len(layers)
