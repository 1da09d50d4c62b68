"""What a request chooses: the scheme, the linears, and whether it needs texts; checked as far as it goes by itself."""

from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from ..errors import OctavoError
from ..runtime.schemes.kv_scheme import Scheme, load_scheme
from ..runtime.schemes.linear_scheme import W8A8
from .dialects.form import as_engines_hold
from .plan import OFFSETS
from .request import ConvertRequest
from .source.quantized.weight import CodedLinear
from .spelling import codes_stay, named


def _of_texts(scheme: Scheme) -> str:
    """What a scheme has that only texts and the whole model give."""
    return "codebooks" if scheme.has_codebooks else "bases" if scheme.has_bases else "sharp layers"


def chosen_scheme(request: ConvertRequest) -> Scheme:
    """The scheme of cache and attention that is asked for; with the source's scales, for K and V as engines hold them.

    Raises:
        OctavoError: an unknown preset, a file that holds no scheme, one that leaves everything in float, or scales of 1
            for codes that are no fp8.
    """
    scheme, scales = load_scheme(request.scheme), request.kv_scales
    if scales != "data" and not scheme.is_static:
        raise OctavoError(f"{named('kv_scales')} {scales}: scheme {scheme.name} has no static scales; leave it out")
    if scales in ("random", "source") and scheme.needs_whole:
        books = f"the {_of_texts(scheme)} of {scheme.name} come from texts"
        raise OctavoError(f"{named('kv_scales')} {scales}: {books}; leave it out")
    if request.linear is None and not scheme.is_quantized and request.embeddings == "float":
        raise OctavoError(f"{named('linear=None')}: scheme {scheme.name} quantizes nothing either; choose another")
    if scales == "source":
        return as_engines_hold(scheme)
    return scheme.with_scales_of_one() if scales == "none" else scheme


def choose_linears(model: nn.Module, request: ConvertRequest, stated: list[str], head: str) -> list[str]:
    """Names of the linear layers to quantize, before `float_outliers` and `float_costliest`.

    Args:
        stated: globs of those that the architecture leaves in float.
        head: name of the last linear.

    Raises:
        OctavoError: a name or glob of `float_linears` matches no linear layer, or the last one beside `embeddings`
            that are to be in int8.
    """
    if request.linear is None:
        return []
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # What is stated is for static int8: inputs with scales of their own, or in floats, bear outliers of a few layers.
    stated = [glob for glob in stated if glob != head] if request.linear.label == W8A8 else []
    patterns = list(stated if request.float_linears is None else request.float_linears)
    for pattern in request.float_linears or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OctavoError(
                f"{named('float_linears')} {pattern}: matches no linear layer; they are named as {names[0]}"
            )
        if request.embeddings == "int8" and fnmatchcase(head, pattern):
            given = f"{named('embeddings')} int8 and {named('float_linears')} {pattern}"
            raise OctavoError(f"{given} exclude each other: both say what {head} is")
    if request.float_head is not False:
        patterns.append(head)
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]


def choose_codes(request: ConvertRequest, found: dict[str, CodedLinear], head: str) -> dict[str, CodedLinear]:
    """The linears of a source whose codes stay as they are: all that are in codes, or none if they are to be decoded.

    Args:
        found: those in codes, by name.
        head: name of the last linear.

    Raises:
        OctavoError: no kind of linear here holds them, or what is asked for would change them.
    """
    where = f"{named('model')} {request.model}"
    if request.requantize and not found:
        raise OctavoError(f"{named('requantize')}: {where} has no linear in codes; leave it out")
    if request.requantize or not found:
        return {}
    for name, linear in found.items():
        if linear.label is None:
            raise OctavoError(
                f"{where}: {name} {linear.fault}; no kind of linear here holds its codes as they are: "
                f"{named('requantize')} decodes them and quantizes them again as {named('linear')} says"
            )
    asked = _changes_codes(request, head in found)
    if asked is not None:
        labels = ", ".join(sorted({linear.label for linear in found.values()}))
        raise OctavoError(codes_stay(asked, f"{request.model} are in codes already ({labels})"))
    return found


def _changes_codes(request: ConvertRequest, has_head: bool) -> str | None:
    """What of a request would change linears that are in codes; None if nothing would."""
    given = {
        named("a linear"): request.linear_is_given,
        f"{named('anti_method')} {request.anti_method}": bool(request.anti_method),
        named("float_linears"): request.float_linears is not None,
        named("mean_bits"): request.mean_bits is not None,
        named("float_outliers"): bool(request.float_outliers),
        f"{named('float_head')} {request.float_head}": request.float_head is has_head or request.float_head is False,
        f"{named('embeddings')} int8": has_head and request.embeddings == "int8",
    }
    return next((field for field, is_given in given.items() if is_given), None)


def _check_statistics_file(file: Path | None, output: Path) -> None:
    if file is None:
        return
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise OctavoError(f"{named('save_statistics')} {file}: is no file in a directory that exists")
    if file.resolve().parent == output.resolve():
        raise OctavoError(
            f"{named('save_statistics')} {file}: lies in {named('output')}, written whole; name another place"
        )


def check_treatment(request: ConvertRequest, scheme: Scheme) -> None:
    """Raise an `OctavoError` if outliers cannot be treated as asked for, or statistics cannot be saved so."""
    method, statistics = request.anti_method, request.save_statistics
    if method == OFFSETS and scheme.needs_whole:
        what = _of_texts(scheme)
        raise OctavoError(f"{named('anti_method')} m2: shifts what the {what} of {scheme.name} are for; take another")
    if method and statistics:
        raise OctavoError(
            f"{named('save_statistics')}: {named('anti_method')} {method} changes what is observed, and the file is "
            "for the model as it is; save it in a run without"
        )
    _check_statistics_file(statistics, request.output)


def needs_texts(request: ConvertRequest, linears: list[str]) -> bool:
    """Whether anything that is asked for rests on the calibration texts, but for the scheme of the cache."""
    linear = request.linear
    by_inputs = linears and (linear.needs_inputs or request.anti_method or linear.w_method != "MinMax")
    chooses = request.float_outliers or request.float_costliest or request.mean_bits
    return bool(by_inputs or request.save_statistics or chooses)
