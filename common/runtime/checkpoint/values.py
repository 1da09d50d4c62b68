"""Whether the values of a loaded checkpoint are sound: floats finite, scales positive, offsets such as codes have.

Tensors that lie in a mapped file are read there, in one pass each that allocates nothing of their size.
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


def _floats(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of what is in float, or in codes that are floats, and in memory."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not tensor.is_meta and tensor.numel():
            yield name, tensor


def check_values(source: str, model: nn.Module, scheme: Scheme) -> None:
    """Raise an `OctavoError` that names the first tensor of a loaded model with a value that none can have."""
    for name, tensor in _floats(model):
        if not is_finite(tensor):
            raise OctavoError(f"{source}: {name} holds NaN or Inf; copy the directory again or convert again")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.check(f"{source}: {name}")
    if scheme.is_static and not any(buffer.is_meta for buffer in model.buffers()):
        try:
            read_scales(attention_modules(model), scheme, stated_decoder(model))
        except OctavoError as error:
            raise OctavoError(f"{source}: {str(error).removeprefix('checkpoint: ')}") from None
