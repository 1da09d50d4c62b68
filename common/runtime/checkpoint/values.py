"""Whether the values of a loaded checkpoint are sound: floats finite, scales positive, offsets such as codes have.

Tensors that lie in a mapped file are read there, in one pass each that allocates nothing of their size and keeps no
part in memory: of a table of embeddings, few rows are ever used, and of what was packed, none.
"""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn

from ...errors import OctavoError
from ..decoder import attention_modules, stated_decoder
from ..linear_values import is_finite
from ..quantized_linear import QuantizedLinear
from ..schemes.kv_scheme import Scheme
from .buffers import read_scales
from .mapped import release_pages

_VALUES_CHECKED = 1 << 22
"""Values that are looked at before their pages are given back."""


def _floats(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of what is in float, or in codes that are floats, and in memory."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not tensor.is_meta and tensor.numel():
            yield name, tensor


def _is_sound(tensor: torch.Tensor) -> bool:
    """Whether all values of a tensor are finite, of which no more than a part is in memory at once."""
    tensor = tensor.detach()
    parts = tensor.view(-1).split(_VALUES_CHECKED) if tensor.is_contiguous() else (tensor,)
    for part in parts:
        if not is_finite(part):
            return False
        release_pages(part)
    return True


def check_values(source: str, model: nn.Module, scheme: Scheme) -> None:
    """Raise an `OctavoError` that names the first tensor of a loaded model with a value that none can have."""
    for name, tensor in _floats(model):
        if not _is_sound(tensor):
            raise OctavoError(f"{source}: {name} holds NaN or Inf; copy the directory again or convert again")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            parts = list(module.buffers())  # before it packs some
            module.check(f"{source}: {name}")
            for part in parts:
                release_pages(part)
    if scheme.is_static and not any(buffer.is_meta for buffer in model.buffers()):
        try:
            read_scales(attention_modules(model), scheme, stated_decoder(model))
        except OctavoError as error:
            raise OctavoError(f"{source}: {str(error).removeprefix('checkpoint: ')}") from None
