"""Conversions without what they say on the way."""

import contextlib
import io

from octavo import ConversionReport, ConvertRequest, convert


def convert_quietly(request: ConvertRequest) -> ConversionReport:
    """Convert, without bars and notes on stderr.

    Raises:
        OctavoError: anything that the user can mend.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        return convert(request)
