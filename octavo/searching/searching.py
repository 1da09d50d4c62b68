"""The flags of `octavo search`, and what it does in turn."""

import argparse
import hashlib
import json
import shlex
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..common.command import DEVICES, OneLineParser, aligned
from ..common.convert.calibration.texts import default_texts
from ..common.convert.flag_values import count, limit, positive
from ..common.convert.measure.fidelity import windows
from ..common.convert.source.checkpoint import check_device
from ..common.errors import OctavoError
from ..common.runtime.cache.sizes import COUNTED_LENGTH
from ..common.runtime.schemes.kv_scheme import Scheme, load_scheme
from ..common.runtime.version import VERSION
from ..comparing.measuring import model_digest, write_whole
from ..counting import bits_note
from ..evaluation.flags import read_text
from ..generate import Speaker, load_stock
from ..machine import device_name
from ..place import Place, find_place
from ..planning.sizes import size_of
from .held_out import Row, rows_of
from .latency import Stopwatch, Times, check_milliseconds
from .probe import Probe
from .report import layer_table, page, sentence, table_of
from .sensitivity import Sensitivity
from .sides import Option, options_of, sides_of
from .store import Store
from .targets import Costs, below_kl, within_bits, within_bytes, within_milliseconds

SCHEMES = ("octavo-2", "octavo-3", "octavo-4")
WINDOWS = (8, 64)
SCHEME_FILE = "scheme.json"


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take the model, the budget, what may be chosen and what is measured."""
    parser.add_place("MODEL", "any float model")
    add, budget = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--bits", type=limit, metavar="N", help="most bits of an element of K and V, all counted")
    budget.add_argument("--memory", metavar="SIZE", help="most memory of the cache of one sequence, such as 200MB")
    about = "most time of attention in a decode step at --context tokens on this machine, all layers together"
    budget.add_argument("--milliseconds", type=limit, metavar="N", help=about)
    budget.add_argument("--kl", type=limit, metavar="NATS", help="most KL to the float model")
    about = "to write into; the same command goes on where one was cut off"
    add("--out", type=Path, required=True, metavar="DIR", help=about)
    add(
        "--context",
        type=positive,
        default=COUNTED_LENGTH,
        metavar="N",
        help="tokens at which bits and memory are counted and times taken (default 2048)",
    )
    about = f"whose K and V a layer may take (default {' '.join(SCHEMES)})"
    add("--schemes", nargs="+", default=SCHEMES, metavar="NAME", help=about)
    about = "newest tokens in float that it may keep, besides what its schemes say (default 8 64)"
    add("--float_windows", nargs="*", type=count, default=WINDOWS, metavar="N", help=about)
    add("--calib_file", type=Path, metavar="FILE", help="text to choose by (default: half of one of Octavo's)")
    add("--calib_windows", type=positive, default=3, metavar="N", help="windows of it (default 3)")
    add(
        "--calib_length",
        type=positive,
        default=512,
        metavar="N",
        help="tokens of each, the later half scored (default 512)",
    )
    add("--eval_file", type=Path, metavar="FILE", help="held-out text to verify on (default: the other half)")
    add("--windows", type=positive, default=2, metavar="N", help="windows of it (default 2)")
    add("--length", type=positive, default=2048, metavar="N", help="tokens of each (default 2048)")
    add("--device_type", choices=DEVICES, default="cpu", help="where to run (default cpu)")


@dataclass(frozen=True)
class _Text:
    """A text, the flag that gives it, and windows of it."""

    flag: str
    text: str
    windows: int
    length: int

    def conditions(self, run: dict[str, Any]) -> dict[str, Any]:
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        return {**run, "text": digest, "windows": self.windows, "length": self.length}

    def samples(self, speaker: Speaker) -> list[torch.Tensor]:
        """Windows of token ids `[S]`, where the model is."""
        ids = speaker.tokenizer(self.text, return_tensors="pt", verbose=False)["input_ids"][0].long()
        try:
            found = windows(ids.to(speaker.model.device), self.length, self.windows)
        except ValueError as error:
            raise OctavoError(f"{self.flag}: {error}; give a longer text, or fewer and shorter windows") from None
        return [window[0] for window in found]


def _texts(flags: argparse.Namespace) -> tuple[_Text, _Text]:
    """What the choice is made by, and what it is verified on."""
    own = default_texts()
    for name, least in (("calib_length", 4), ("length", 2)):
        if getattr(flags, name) < least:
            raise OctavoError(f"--{name} {getattr(flags, name)}: nothing is predicted; give {least} or more")
    halves = own[: len(own) // 2], own[len(own) // 2 :]
    calib, held = (
        "\n".join(half) if file is None else read_text(flag, file)
        for flag, file, half in zip(
            ("--calib_file", "--eval_file"), (flags.calib_file, flags.eval_file), halves, strict=True
        )
    )
    if calib == held:
        raise OctavoError(f"--eval_file {flags.eval_file}: is what the choice is made by; give another text")
    return (
        _Text("--calib_file", calib, flags.calib_windows, flags.calib_length),
        _Text("--eval_file", held, flags.windows, flags.length),
    )


class _Search:
    """One search: the model, loaded when it is needed, and what is measured of it."""

    def __init__(self, flags: argparse.Namespace, place: Place, calib: _Text, held: _Text) -> None:
        self._flags, self._place, self._calib, self._held = flags, place, calib, held
        run = {
            "version": VERSION,
            "model": model_digest(place.directory),
            "device": flags.device_type,
            "threads": torch.get_num_threads(),
        }
        scored = {"scored": calib.length // 2}
        self._measured = Store(flags.out / "measured", {**calib.conditions(run), **scored})
        self._verified = Store(flags.out / "verified", held.conditions(run))
        self._run = run

    @cached_property
    def _loaded(self) -> tuple[Speaker, torch.dtype]:
        speaker = load_stock(self._place.directory, "float", None, self._flags.device_type)
        dtype = speaker.model.dtype
        speaker.model.float()
        return speaker, dtype

    @property
    def speaker(self) -> Speaker:
        """The float model; in float32, since rounding to 16 bits costs more than coding some of the layers."""
        return self._loaded[0]

    @cached_property
    def stopwatch(self) -> Stopwatch:
        """What times, in the dtype that the model is stored and runs in."""
        speaker, dtype = self._loaded
        machine = {"machine": device_name(speaker.model.device), "torch": torch.__version__}
        run = {**self._run, **machine, "dtype": str(dtype), "context": self._flags.context}
        return Stopwatch(speaker, dtype, self._flags.context, Store(self._flags.out / "timed", run))

    @cached_property
    def samples(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Windows to choose by, and to verify on; both before hours are spent."""
        return self._calib.samples(self.speaker), self._held.samples(self.speaker)

    def _probe(self) -> Probe:
        return Probe(self.speaker.model, self.samples[0], self._calib.length // 2)

    def costs(self, schemes: list[Scheme]) -> tuple[Costs, Sensitivity]:
        """What each layer may store, and what that loses."""
        sides, _ = sides_of(schemes, self._flags.float_windows), self.samples
        options, config = options_of(sides), self.speaker.model.config.get_text_config(decoder=True)
        seconds = self._seconds(options)
        sensitivity = Sensitivity(self._probe, config.num_hidden_layers, self._measured)
        rows = sensitivity.of_sides(sides)
        losses = [[row[option.key] + row[option.value] for option in options] for row in rows]
        return Costs(config, self.speaker.model.dtype, options, losses, self._flags.context, seconds), sensitivity

    def _seconds(self, options: list[Option]) -> list[list[float]] | None:
        """Times of layers under a budget of time, which is refused before hours are spent."""
        if self._flags.milliseconds is None:
            return None
        seconds = self.stopwatch.of_options(options)
        check_milliseconds(self._flags.milliseconds, options, seconds, self._flags.context)
        return seconds

    def rows(self, costs: Costs, chosen: list[int], bits: float) -> list[Row]:
        """What was found and uniform schemes, on held-out text."""
        budget = self._flags.milliseconds
        seconds = None if budget is None else budget / 1e3
        return rows_of(costs, chosen, bits, self.speaker, self.samples[1], self._verified, seconds)

    def times(self, costs: Costs, chosen: list[int]) -> Times | None:
        """Of what was found, under a budget of time."""
        budget, context = self._flags.milliseconds, self._flags.context
        if budget is None:
            return None
        predicted = costs.predicted_seconds(chosen)
        found = (1e3 * seconds for seconds in (predicted, *self.stopwatch.of_whole(costs.scheme(chosen))))
        return Times(budget, *found, context, device_name(self.speaker.model.device))


def _chosen(flags: argparse.Namespace, costs: Costs, sensitivity: Sensitivity) -> list[int]:
    if flags.bits is not None:
        return within_bits(costs, flags.bits)
    if flags.memory is not None:
        return within_bytes(costs, size_of(flags.memory))
    if flags.milliseconds is not None:
        return within_milliseconds(costs, flags.milliseconds)
    return below_kl(costs, flags.kl, sensitivity.of_whole)


def _conditions(flags: argparse.Namespace, calib: _Text, held: _Text, whole: float, summed: float) -> list[str]:
    def said(text: _Text, file: Path | None) -> str:
        name = "a part of the text that comes with Octavo" if file is None else file.name
        return f"{text.windows} window{'s' * (text.windows > 1)} of {text.length:,} tokens of {name}"

    return [
        f"Chosen on {said(calib, flags.calib_file)}, the later half scored, each layer coded alone: in sum KL "
        f"{summed:.5f}, and {whole:.5f} as a whole.",
        f"Verified on {said(held, flags.eval_file)}.",
        f"{bits_note(flags.context)}. The float model is float32.",
    ]


def _budget(flags: argparse.Namespace) -> str:
    if flags.bits is not None:
        return f"{flags.bits:g} bits"
    if flags.milliseconds is not None:
        return f"{flags.milliseconds:g} ms at {flags.context} tokens"
    return f"KL {flags.kl:g}" if flags.kl is not None else f"{flags.memory} at {flags.context} tokens"


def run(flags: argparse.Namespace) -> None:
    """Measure, choose, verify; write the scheme, the figures and the page, and print what was found.

    Raises:
        OctavoError: there is no such model, scheme or text; the budget cannot be kept; something cannot be written.
    """
    check_device(flags.device_type)
    calib, held = _texts(flags)
    schemes = [load_scheme(name) for name in flags.schemes]
    if flags.memory is not None:
        size_of(flags.memory)
    place = find_place(flags.model_path)
    if place.is_converted:
        raise OctavoError(f"{flags.model_path}: is converted; search takes the float model")
    search = _Search(flags, place, calib, held)
    costs, sensitivity = search.costs(schemes)
    chosen = _chosen(flags, costs, sensitivity)
    name = Path(flags.model_path).name or flags.model_path
    origin = f"octavo search {name}, {_budget(flags)}: of {', '.join(scheme.name for scheme in schemes)}"
    scheme = costs.scheme(chosen, f"searched, {_budget(flags)}", origin)
    file = flags.out / SCHEME_FILE
    write_whole(file, json.dumps(scheme.to_dict(), indent=2) + "\n")
    bits = max(costs.bits(scheme), flags.bits or 0.0)
    rows = search.rows(costs, chosen, bits)
    conditions = _conditions(flags, calib, held, sensitivity.of_whole(scheme), costs.predicted(chosen))
    times = search.times(costs, chosen)
    if times is not None:
        conditions.append(times.sentence())
    limit = f"{bits:.3f} bits" if times is None else f"{flags.milliseconds:g} ms"
    said = sentence(rows, limit)
    _write(flags, name, rows, costs, chosen, conditions, said, times)
    _print(flags, rows, costs, chosen, conditions, said)


def _write(
    flags: argparse.Namespace, name: str, rows: list[Row], costs: Costs, chosen: list[int], conditions: list[str],
    said: str, times: Times | None,
) -> None:  # fmt: skip
    data = {
        "model": flags.model_path,
        "budget": _budget(flags),
        "advice": said,
        "conditions": conditions,
        "bytes": costs.nbytes(costs.scheme(chosen)),
        "results": [asdict(row) for row in rows],
        "options": [option.scheme.to_dict() for option in costs.options],
        "losses": costs.losses,
        "seconds": costs.seconds,
        "milliseconds": None if times is None else asdict(times),
        "chosen": chosen,
    }
    write_whole(flags.out / "results.json", json.dumps(data, indent=2) + "\n")
    write_whole(flags.out / "index.html", page(name, said, rows, costs, chosen, conditions))


def _print(
    flags: argparse.Namespace, rows: list[Row], costs: Costs, chosen: list[int], conditions: list[str], said: str
) -> None:
    for table, texts in ((layer_table(costs, chosen), 3), (table_of(rows), 1)):
        cells = [table.heads, *([cell.text for cell in row] for row in table.rows)]
        print("\n".join(aligned(cells, texts=texts)) + "\n")
    size = costs.nbytes(costs.scheme(chosen))
    print(f"{said} At {flags.context:,} tokens the cache takes {size / 1e6:,.4g} MB.")
    print("\n".join(conditions))
    print(f"\n  octavo run {shlex.quote(flags.model_path)} --scheme {shlex.quote(str(flags.out / SCHEME_FILE))}\n")
    print(flags.out / "index.html")
