"""From a float checkpoint to a quantized one; nothing here travels with an output."""

from .api import convert, main
from .report import ConversionReport
from .request import ConvertRequest

__all__ = ["ConversionReport", "ConvertRequest", "convert", "main"]
