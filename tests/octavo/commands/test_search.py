"""`octavo search`: budgets that are kept, results that are taken up again, a scheme file that others read, refusals."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoConfig

from octavo.__main__ import main
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.schemes.kv_scheme import Scheme, load_scheme
from octavo.planning.cache import cache_size
from octavo.searching.latency import DecodeStep
from octavo.searching.probe import Probe

from ...support import TEXTS, assert_one_error_line

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [
    "--calib_windows",
    "1",
    "--calib_length",
    "80",
    "--windows",
    "1",
    "--length",
    "80",
    "--schemes",
    "octavo-2",
    "octavo-4",
]


@pytest.fixture
def command(source: Path, tmp_path: Path) -> list[str]:
    """A search of the tiny Llama, but for the budget."""
    texts = {"calib": TEXTS[:4], "eval": TEXTS[4:]}
    for name, part in texts.items():
        (tmp_path / f"{name}.txt").write_text(" ".join(part))
    files = [word for name in texts for word in (f"--{name}_file", str(tmp_path / f"{name}.txt"))]
    return ["search", str(source), "--out", str(tmp_path / "an output"), *SMALL, "--float_windows", "16", *files]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the schemes that are measured from here on."""
    found: list[str] = []
    kl = Probe.kl

    def counted(self: Probe, scheme: Scheme, first: int = 0) -> float:
        found.append(scheme.name)
        return kl(self, scheme, first)

    monkeypatch.setattr(Probe, "kl", counted)
    return found


def found_scheme(command: list[str]) -> Scheme:
    return load_scheme(str(Path(command[3]) / "scheme.json"))


def test_bits_are_kept_and_others_read_the_scheme(
    source: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--bits", "5", "--context", "256"]) == 0
    said, out = capsys.readouterr().out, Path(command[3])
    scheme, config = found_scheme(command), AutoConfig.from_pretrained(source)
    bits = kv_bits_per_element(config, scheme, 256)
    least = kv_bits_per_element(config, load_scheme("octavo-2"), 256)
    assert least < bits <= 5 and scheme.layers
    assert [layer.scheme for layer in QuantizedCache(config, scheme).layers] == list(map(scheme.of_layer, range(3)))
    results = json.loads((out / "results.json").read_text())
    assert results["results"][0]["name"] == "searched" and results["results"][0]["bits"] == bits
    assert all(row["bits"] <= 5 and row["fidelity"]["kl"] > 0 for row in results["results"])
    assert f"searched: {bits:.3f} bits, KL" in said and "best uniform scheme scored, of at most 5.000 bits, is" in said
    assert said.endswith("index.html\n") and "KL alone" in (out / "index.html").read_text()

    file = str(out / "scheme.json")
    assert main(["run", str(source), "--scheme", file, "--prompt", TEXTS[0], "--max_new_tokens", "3"]) == 0
    text = ["--eval_file", str(tmp_path / "eval.txt"), *SMALL[4:8], "--tasks", "--written", "0"]
    capsys.readouterr()
    assert main(["evaluate", str(source), "--schemes", file, *text, "--json", str(out / "same.json")]) == 0
    same = json.loads((out / "same.json").read_text())["results"][file]
    assert same["text"]["kl"] == pytest.approx(results["results"][0]["fidelity"]["kl"], rel=1e-6)


def test_memory_is_kept_to_the_byte(source: Path, command: list[str]) -> None:
    config = AutoConfig.from_pretrained(source)
    sizes = [cache_size(config, load_scheme(name), 300).kept for name in ("octavo-2", "octavo-4")]
    budget = sum(sizes) / 2
    assert main([*command, "--memory", f"{budget / 1e6:.6f}MB", "--context", "300"]) == 0
    assert sizes[0] < cache_size(config, found_scheme(command), 300).kept <= budget


def test_kl_is_kept_by_the_whole_scheme_on_the_text_that_chose(command: list[str]) -> None:
    assert main([*command, "--bits", "3.6"]) == 0
    verified = json.loads((Path(command[3]) / "measured" / "whole.json").read_text())["figures"]
    budget = 1.1 * next(iter(verified.values()))
    assert main([*command, "--kl", f"{budget:.9f}"]) == 0
    verified = json.loads((Path(command[3]) / "measured" / "whole.json").read_text())["figures"]
    fields = {name: value for name, value in found_scheme(command).to_dict().items() if name not in ("name", "origin")}
    assert verified[json.dumps(fields, sort_keys=True)] <= budget


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets steps take times of our own, by layers and bits of K times those of V; names of schemes timed from here."""
    found: list[str] = []

    def made(self: DecodeStep, model: object, scheme: Scheme, layers: Sequence[int], *_: object) -> None:
        found.append(scheme.name)
        parts = [scheme.of_layer(layer) for layer in layers]
        sizes = [16 * 16 if part.key is None else part.key.bits * part.value.bits for part in parts]
        self.taken = 1e-4 * sum(sizes)

    monkeypatch.setattr(DecodeStep, "__init__", made)
    monkeypatch.setattr(DecodeStep, "seconds", lambda self: self.taken)
    return found


def test_time_is_kept_and_the_whole_is_timed_beside_floats(
    command: list[str], timed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--milliseconds", "2.5", "--context", "512"]) == 0
    said = capsys.readouterr().out
    results = json.loads((Path(command[3]) / "results.json").read_text())
    seconds, losses, chosen = (results[name] for name in ("seconds", "losses", "chosen"))

    def total(rows: list[list[float]], choice: Sequence[int]) -> float:
        return sum(row[option] for row, option in zip(rows, choice, strict=True))

    every = itertools.product(range(len(seconds[0])), repeat=3)
    best = min(total(losses, choice) for choice in every if total(seconds, choice) <= 2.5e-3)
    assert total(seconds, chosen) <= 2.5e-3 and total(losses, chosen) == pytest.approx(best, abs=1e-12)
    times = results["milliseconds"]
    assert times["predicted"] == pytest.approx(times["measured"]) == pytest.approx(1e3 * total(seconds, chosen))
    assert times["floats"] == pytest.approx(3 * 25.6)
    assert (
        "ms measured as a whole; 76.8 ms with floats." in said
        and "uniform scheme scored, of at most 2.5 ms, is" in said
    )
    assert timed[-1] == "float" and len(timed) == len(seconds[0]) + 2
    assert all(row["name"] == "searched" or not row["is_preset"] for row in results["results"])
    timed.clear()
    assert main([*command, "--milliseconds", "2.5", "--context", "512"]) == 0
    assert timed == [] and capsys.readouterr().out == said


def test_less_time_than_the_fastest_takes_is_refused_before_anything_is_coded(
    command: list[str], timed: list[str], measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--milliseconds", "1.1"]) == 1
    parts = ("--milliseconds 1.1: on this machine the fastest of these schemes (octavo-2, window 8) takes 1.2 ms",)
    assert_one_error_line(capsys.readouterr().err, *parts, "at 2,048 tokens")
    assert timed and measured == []


def test_what_was_measured_is_not_measured_again(
    command: list[str], measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--bits", "3.6"]) == 0
    said = capsys.readouterr().out
    assert len(measured) == 3 * 8 + 1  # layers by sides, and the whole
    measured.clear()
    assert main([*command, "--bits", "3.6"]) == 0
    assert measured == [] and capsys.readouterr().out == said

    (Path(command[3]) / "measured" / "layer-1.json").write_text('{"name": "lay')
    assert main([*command, "--bits", "3.6"]) == 0
    assert measured == ["layer 1"] * 8 and "layer-1.json cannot be read" in capsys.readouterr().err
    measured.clear()
    assert main([*command, "--bits", "3.6", "--calib_length", "60"]) == 0
    assert len(measured) == 25 and "layer 0: measured again: other length, scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--bits", "2"], ("--bits 2: these schemes take from 2.96 to 4.", "bits at 2,048 tokens")),
        (["--memory", "0.1MB", "--context", "8192"], ("--memory: 0.1 MB; at 8,192 tokens the cache takes from", "to")),
        (["--kl", "1e-9"], ("--kl 1e-09: the least that these schemes lose is", "octavo-8")),
        (["--memory", "much"], ("--memory much: is no size",)),
        (["--bits", "3", "--length", "9000"], ("--eval_file: the text has", "give a longer text")),
        (["--bits", "3", "--calib_length", "3"], ("--calib_length 3: nothing is predicted; give 4 or more",)),
        (["--bits", "3", "--calib_file", "/nowhere"], ("--calib_file /nowhere: cannot be read",)),
        (["--bits", "3", "--schemes", "octavo2"], ("octavo2", "did you mean octavo-2")),
        (["--bits", "3", "--schemes", "ascend-c8"], ("--schemes ascend-c8: needs calibration",)),
    ],
)
def test_what_cannot_be_is_one_line(
    command: list[str], flags: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *flags]) == 1
    assert_one_error_line(capsys.readouterr().err, *parts)


def test_the_text_that_chooses_does_not_verify(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    calib = command[command.index("--calib_file") + 1]
    assert main([*command, "--bits", "3", "--eval_file", calib]) == 1
    assert_one_error_line(capsys.readouterr().err, f"--eval_file {calib}: is what the choice is made by")


def test_one_budget_is_needed(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(command)
    assert_one_error_line(
        capsys.readouterr().err, "one of the arguments --bits --memory --milliseconds --kl is required"
    )
