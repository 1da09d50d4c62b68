"""Bits of an element of K and V: how every table here counts them, and the words in which its footing says so."""

import torch
from transformers import PreTrainedConfig

from .common.runtime.cache.sizes import kv_bits_per_element
from .common.runtime.schemes.kv_scheme import CROP_ROOM, Scheme


def counted_bits(config: PreTrainedConfig, scheme: Scheme, tokens: int, dtype: torch.dtype) -> float:
    """Bits of an element of K and V in sequences of `tokens` tokens, as a mean over the layers.

    Codes, scales, zeros, codebooks, outliers, sinks and the float window count, and nothing that a cache keeps besides
    in order to be cropped.

    Args:
        config: of the model.
        dtype: of the model's states, in which a cache without codes keeps them.
    """
    if not scheme.is_quantized:
        return 8.0 * dtype.itemsize
    return kv_bits_per_element(config.get_text_config(decoder=True), scheme, tokens)


def bits_note(tokens: int | None, of: str = "") -> str:
    """What `counted_bits` are, for the footing of a table.

    Args:
        tokens: None where the table says how many.
        of: what has such sequences, if the table does not say it: " of a model of ...".
    """
    length = "so many" if tokens is None else f"{tokens:,}"
    return (
        f"bits: of an element of K and V in sequences of {length} tokens{of}: codes, scales, zeros, codebooks, "
        "outliers, sinks and windows"
    )


STORED_NOTE = (
    f"stored: bits by the bytes kept, with floats of the newest {CROP_ROOM} tokens by which a cache can be cropped, "
    "and without what layers that slide forget"
)
"""What stands in a table beside `counted_bits` where bytes of memory are planned."""
