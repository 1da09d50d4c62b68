"""What is compared: the float model, schemes of its KV cache, and presets by which it is converted for the time."""

import contextlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..common.convert.api import converted
from ..common.convert.flags import parse_flags, request_of
from ..common.convert.presets import RECIPES, RENAMED, check_preset, load_recipe
from ..common.convert.source.config import chosen_architecture
from ..common.errors import OctavoError
from ..common.runtime.schemes.kv_scheme import PRESETS, Scheme, load_scheme
from ..evaluation.evaluating import FLOAT
from ..generate import Speaker, with_scheme
from ..place import converted_speaker, find_place
from ..wording import WHEN, codec_short

TELLING = ("octavo-8", "int8-token", "fp8-token", "octavo-4", "int4-token", "octavo-3", "octavo-2")
"""Schemes that are compared unless others are named: none needs calibration."""
ALL = "all"


@dataclass(frozen=True)
class Candidate:
    """One that is measured.

    Attributes:
        name: of its results.
        kind: "float", "scheme" or "preset".
        about: what it is, in a few words.
        command: that runs the model so, but for the text behind it.
        definition: on which its results depend, as plain data.
        speaker: gives the model, ready to speak, and the bytes of its weight files, for as long as it is measured.
    """

    name: str
    kind: str
    about: str
    command: str
    definition: dict[str, Any]
    speaker: Callable[[], AbstractContextManager[tuple[Speaker, int]]]


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint, in the order of their names."""
    return sorted(file for file in directory.iterdir() if file.suffix in (".safetensors", ".bin"))


def weight_bytes(directory: Path) -> int:
    """Bytes of the weight files of a checkpoint."""
    return sum(file.stat().st_size for file in weight_files(directory))


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


def scheme_candidates(
    names: Sequence[str], model: str, reference: Speaker, directory: Path, statistics: Path | None
) -> list[Candidate]:
    """Schemes of the float model's cache.

    Raises:
        OctavoError: there is none of a name, it needs statistics, or two results would have one name.
    """
    found = []
    for name in names:
        speaker = with_scheme(reference, name, statistics)
        speaker.new_cache()  # so that what the model does not bear is told before hours are spent
        found.append(_of_scheme(speaker.scheme.name, name, reference, speaker, model, directory, statistics))
    return found


def _of_scheme(
    name: str, asked: str, reference: Speaker, speaker: Speaker, model: str, directory: Path, statistics: Path | None
) -> Candidate:
    definition: dict[str, Any] = {"scheme": speaker.scheme.to_dict()}
    command = f"octavo run {shlex.quote(model)} --scheme {shlex.quote(asked)}"
    if speaker.scheme.is_static and statistics is not None:
        stat = statistics.stat()
        definition["statistics"] = [stat.st_size, stat.st_mtime_ns]
        command = f"{command} --statistics {shlex.quote(str(statistics))}"
    kind = FLOAT if speaker is reference else "scheme"
    size = weight_bytes(directory)
    return Candidate(
        name, kind, _about(speaker.scheme), command, definition, lambda: contextlib.nullcontext((speaker, size))
    )


def preset_candidates(names: Sequence[str], model: str, directory: Path, device: str, work: Path) -> list[Candidate]:
    """Presets, by each of which the model is converted when its turn comes; the conversion goes when it is measured.

    Args:
        work: where conversions lie for so long.
    """
    return [_of_preset(name, model, directory, device, work) for name in names]


def _of_preset(name: str, model: str, directory: Path, device: str, work: Path) -> Candidate:
    recipe = load_recipe(name)
    definition = {"preset": {flag: value for flag, value in recipe.items() if flag != "about"}}
    command = f"octavo convert {shlex.quote(model)} --preset {name}"
    speaker = partial(_converted, name, directory, device, work)
    return Candidate(f"preset {name}", "preset", recipe["about"], command, definition, speaker)


@contextmanager
def _converted(name: str, source: Path, device: str, work: Path) -> Iterator[tuple[Speaker, int]]:
    architecture = chosen_architecture(source, None)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=work) as directory:
        output = Path(directory) / name
        words = ["--model_path", str(source), "--save_directory", str(output), "--preset", name]
        words += ["--device_type", device]
        report = converted(request_of(parse_flags(architecture.name, words, architecture.decoder.head), architecture))
        print(report.summary(), file=sys.stderr)
        yield converted_speaker(find_place(str(output)), device), weight_bytes(output)


def check_names(candidates: Sequence[Candidate]) -> None:
    """Raise an `OctavoError` if two candidates have one name."""
    seen: set[str] = set()
    for candidate in candidates:
        if candidate.name in seen:
            raise OctavoError(f"--schemes: two are called {candidate.name}; give one of them another name in its file")
        seen.add(candidate.name)
