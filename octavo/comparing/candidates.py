"""What is compared: the float model, schemes of its KV cache, and presets by which it is converted for the time."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..common.convert.presets import RECIPES, RENAMED, check_preset, load_recipe
from ..common.errors import OctavoError
from ..common.runtime.schemes.kv_scheme import PRESETS, Scheme, load_scheme
from ..evaluation.evaluating import FLOAT
from ..generate import Speaker, with_scheme
from ..wording import WHEN, codec_short
from .conversions import conversion, weight_bytes
from .options import Step

TELLING = ("octavo-8", "int8-token", "fp8-token", "octavo-4", "int4-token", "octavo-3", "octavo-2")
"""Schemes that are compared unless others are named: none needs calibration."""
ALL = "all"
STEP = "step"
"""Kind of what is measured only to tell what options add."""


@dataclass(frozen=True)
class Candidate:
    """One that is measured.

    Attributes:
        name: of its results.
        kind: "float", "scheme", "preset" or "step".
        about: what it is, in a few words.
        command: that runs the model so, but for the text behind it; empty where a scheme has no name or file.
        definition: on which its results depend, as plain data.
        speaker: gives the model, ready to speak, and the bytes of its weight files, for as long as it is measured.
        step: which preset or scheme is taken how far, as plain data; None where that is not asked for.
    """

    name: str
    kind: str
    about: str
    command: str
    definition: dict[str, Any]
    speaker: Callable[[], AbstractContextManager[tuple[Speaker, int]]]
    step: dict[str, str] | None = None


def _about(scheme: Scheme) -> str:
    if scheme.key is None and scheme.value is None:
        return WHEN.get(scheme.name, FLOAT)
    stored = f"K {codec_short(scheme.key)}, V {codec_short(scheme.value)}"
    return f"{WHEN[scheme.name]}; {stored}" if scheme.name in WHEN else stored


def scheme_names(asked: Sequence[str] | None, statistics: Path | None) -> list[str]:
    """The schemes to measure, each once and none of them float, which always is; those left out are told on stderr."""
    if asked is None:
        return list(TELLING)
    if list(asked) != [ALL]:
        return [name for name in dict.fromkeys(asked) if name != FLOAT]
    static = [name for name in PRESETS if load_scheme(name).is_static and statistics is None]
    if static:
        print(f"left out, as they need --statistics FILE: {', '.join(static)}", file=sys.stderr)
    return [name for name in PRESETS if name not in (FLOAT, *static)]


def preset_names(asked: Sequence[str]) -> list[str]:
    """The presets to measure, by the names of today.

    Raises:
        OctavoError: there is none of a name.
    """
    if list(asked) == [ALL]:
        return list(RECIPES)
    return list(dict.fromkeys(RENAMED.get(check_preset(name), name) for name in asked))


def float_candidate(model: str, reference: Speaker, directory: Path) -> Candidate:
    """The float model itself."""
    return _of_scheme(FLOAT, FLOAT, reference, reference, model, directory, None)


def scheme_candidate(
    scheme: str | Scheme, model: str, reference: Speaker, directory: Path, statistics: Path | None
) -> Candidate:
    """A scheme of the float model's cache.

    Raises:
        OctavoError: there is none of the name, it needs statistics, or the model does not bear it.
    """
    speaker = with_scheme(reference, scheme, statistics)
    speaker.new_cache()  # so that what the model does not bear is told before hours are spent
    asked = "" if isinstance(scheme, Scheme) else scheme
    return _of_scheme(speaker.scheme.name, asked, reference, speaker, model, directory, statistics)


def _of_scheme(
    name: str, asked: str, reference: Speaker, speaker: Speaker, model: str, directory: Path, statistics: Path | None
) -> Candidate:
    definition: dict[str, Any] = {"scheme": speaker.scheme.to_dict()}
    command = f"octavo run {shlex.quote(model)} --scheme {shlex.quote(asked)}" if asked else ""
    if speaker.scheme.is_static and statistics is not None:
        stat = statistics.stat()
        definition["statistics"] = [stat.st_size, stat.st_mtime_ns]
        command = f"{command} --statistics {shlex.quote(str(statistics))}"
    kind = FLOAT if speaker is reference else "scheme"
    size = weight_bytes(directory)
    return Candidate(
        name, kind, _about(speaker.scheme), command, definition, lambda: contextlib.nullcontext((speaker, size))
    )


def preset_candidate(
    name: str, model: str, directory: Path, device: str, work: Path, more: Sequence[str] = ()
) -> Candidate:
    """A preset, by which the model is converted when its turn comes; the conversion goes when it is measured.

    Args:
        work: where conversions lie for so long.
        more: flags beside it.
    """
    recipe = load_recipe(name)
    definition: dict[str, Any] = {"preset": {flag: value for flag, value in recipe.items() if flag != "about"}}
    if more:
        definition["more"] = list(more)
    command = f"octavo convert {shlex.quote(model)} {shlex.join(['--preset', name, *more])}"
    speaker = partial(conversion, name, more, definition, directory, device, work)
    return Candidate(f"preset {name}", "preset", recipe["about"], command, definition, speaker)


def with_steps(
    candidates: Sequence[Candidate],
    steps: Sequence[Step],
    of_preset: Callable[[Step], Candidate],
    of_scheme: Callable[[Step], Candidate],
) -> list[Candidate]:
    """Candidates, and before one of them the steps to it, of which it is itself the last.

    Args:
        of_preset, of_scheme: the candidate of a step of a preset, or of a scheme.
    """
    *partial_steps, last = steps
    whole = last.of if last.scheme is not None else f"preset {last.of}"
    found: list[Candidate] = []
    for each in candidates:
        if each.name != whole:
            found.append(each)
            continue
        for step in partial_steps:
            made = of_preset(step) if step.scheme is None else of_scheme(step)
            found.append(replace(made, name=step.name, kind=STEP, about=step.about, step=step.as_json()))
        found.append(replace(each, step=last.as_json()))
    return found


def check_names(candidates: Sequence[Candidate]) -> None:
    """Raise an `OctavoError` if two candidates have one name."""
    seen: set[str] = set()
    for candidate in candidates:
        if candidate.name in seen:
            raise OctavoError(f"--schemes: two are called {candidate.name}; give one of them another name in its file")
        seen.add(candidate.name)
