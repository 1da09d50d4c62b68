"""Which fields of a `Scheme` exclude each other: an error says so where a scheme is made, and nowhere later."""

from typing import Any

from ...errors import OctavoError
from .tensor_codec import INTEGERS, Codec

PREFILLS = ("codes", "float")
BASES = ("", "balanced", "oscar")


def check_scheme(scheme: Any) -> None:
    """Raise an `OctavoError` of the first fields of a `Scheme`, each of its type already, that exclude each other."""
    if scheme.prefill not in PREFILLS:
        raise OctavoError(f"scheme {scheme.name}: prefill {scheme.prefill!r} is none of {', '.join(PREFILLS)}")
    _check_bases(scheme)
    _check_sharp_share(scheme)
    if scheme.sinks < 0 or scheme.window < 0:
        raise OctavoError(f"scheme {scheme.name}: sinks and window are numbers of tokens, 0 for none")
    if scheme.query is not None and scheme.query.granularity not in ("head", "tensor"):
        raise OctavoError(f"scheme {scheme.name}: q is quantized per head or tensor with static scales, or not at all")
    if scheme.query is not None:
        key_dtype = scheme.key.dtype if scheme.key else ""
        if scheme.query.dtype != (key_dtype if key_dtype.startswith("fp8") else "int8"):
            raise OctavoError(f"scheme {scheme.name}: q is quantized to the fp8 type of K, or else to int8")
    if scheme.value is not None and scheme.value.before_rope:
        raise OctavoError(f"scheme {scheme.name}: V is not rotated by RoPE; 'before_rope' is for K")
    if scheme.key is not None and scheme.key.levels == "calibrated" and not _has_key_range(scheme.key):
        raise OctavoError(f"scheme {scheme.name}: 'levels' calibrated of K is of static scales per channel before RoPE")
    if scheme.key is not None and scheme.key.before_rope and scheme.rotate_key:
        raise OctavoError(f"scheme {scheme.name}: 'rotate_key' and a K stored before RoPE exclude each other")
    if scheme.prefill == "float" and scheme.is_segmented:
        raise OctavoError(f"scheme {scheme.name}: prefill 'float' excludes sinks, a window and groups of tokens")
    if scheme.smooth_key and scheme.key is not None and scheme.key.is_calibrated:
        raise OctavoError(
            f"scheme {scheme.name}: 'smooth_key' is of dynamic scales; those from calibration count it in"
        )
    if scheme.rotate_value and scheme.value is not None and scheme.value.levels == "calibrated":
        raise OctavoError(f"scheme {scheme.name}: 'rotate_value' and a calibrated codebook of V exclude each other")
    steps = sorted((scheme.step(scheme.key), scheme.step(scheme.value)))
    if steps[1] % steps[0]:
        raise OctavoError(
            f"scheme {scheme.name}: groups of {steps[0]} and {steps[1]} tokens do not fit into one another"
        )


def _has_key_range(key: Codec) -> bool:
    """Whether the ranges that go with codebooks of K are of what is stored."""
    return key.before_rope and not key.dynamic and key.granularity == "channel"


def _check_bases(scheme: Any) -> None:
    """Raise an `OctavoError` of a basis that is none, or that goes with nothing else that is asked for."""
    for part in ("key", "value"):
        basis, codec = getattr(scheme, f"{part}_basis"), getattr(scheme, part)
        if basis not in BASES or (part, basis) == ("value", "balanced"):
            known = [name for name in BASES if name and (part, name) != ("value", "balanced")]
            raise OctavoError(f"scheme {scheme.name}: {part}_basis {basis!r} is none of {', '.join(known)}")
        if basis and (getattr(scheme, f"rotate_{part}") or codec is None or codec.is_calibrated or codec.before_rope):
            raise OctavoError(
                f"scheme {scheme.name}: '{part}_basis' is of dynamic scales after RoPE, and excludes 'rotate_{part}'"
            )
    if scheme.key_basis and scheme.query is not None:
        raise OctavoError(f"scheme {scheme.name}: 'key_basis' is of queries in float; leave out 'query'")
    if scheme.center_key and (
        scheme.key is None or scheme.key.is_calibrated or scheme.key.before_rope or scheme.smooth_key
    ):
        raise OctavoError(
            f"scheme {scheme.name}: 'center_key' is of dynamic scales after RoPE, and excludes 'smooth_key'"
        )
    if scheme.center_key and scheme.prefill == "float":
        raise OctavoError(f"scheme {scheme.name}: prefill 'float' excludes 'center_key'")


def _check_sharp_share(scheme: Any) -> None:
    """Raise an `OctavoError` of a share that is none, or of K whose codes are not narrower than the wider ones."""
    if not scheme.sharp_share:
        return
    if not 0 < scheme.sharp_share < 1:
        raise OctavoError(f"scheme {scheme.name}: 'sharp_share' is a part of the layers, 0 for none")
    if scheme.layers or scheme.query is not None:
        raise OctavoError(f"scheme {scheme.name}: 'sharp_share' excludes 'layers' and 'query'")
    if scheme.key is None or scheme.key.dtype not in INTEGERS or not (scheme.key.dynamic and scheme.key.is_whole):
        raise OctavoError(f"scheme {scheme.name}: 'sharp_share' is of a K in dynamic codes of integers")
    wider = INTEGERS[INTEGERS.index(scheme.key.dtype) + 1 :]
    if scheme.sharp_dtype not in wider:
        raise OctavoError(
            f"scheme {scheme.name}: sharp_dtype {scheme.sharp_dtype!r} is not wider than {scheme.key.dtype}"
            + (f": take one of {', '.join(wider)}" if wider else "")
        )
    scheme.key.widened(scheme.sharp_dtype)  # which raises of what such codes exclude
