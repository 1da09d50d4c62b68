"""What is lost at length: the texts repeat what they say they do, and both contexts end in the same tokens."""

import csv
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from octavo.common.errors import OctavoError
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.stock_model import prepare
from octavo.evaluation.reading import Reader
from octavo.generate import Speaker

from ..support import REPOSITORY, random_ids, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def length(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/length.py`."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return import_module("length")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/length_tables.py` with rows of its own."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    module = import_module("length_tables")
    monkeypatch.setattr(module, "FILE", tmp_path / "length.csv")
    return module


@pytest.mark.parametrize("starts", [[], list(range(0, 8192, 50))], ids=["anywhere", "at sentences"])
def test_the_last_tokens_stand_far_back_as_well(length: ModuleType, starts: list[int]) -> None:
    ids = torch.arange(8192)
    found = length.repeating(ids, starts)
    assert torch.equal(found[:-1024], ids[:-1024])
    distances = (ids - found)[-1024:]
    assert distances.min() >= 2000 and distances.max() <= 6000
    assert len(found[-1024:].unique()) == 1024, "no passage is copied twice"
    assert not starts or all(start in starts for start in found[-1024::128].tolist())


@pytest.mark.parametrize("name", ["float", "octavo-2"])
def test_both_texts_are_read_as_if_alone(length: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(length, "LAST", 96)
    model = prepare(tiny_llama())
    scheme = load_scheme(name)
    speaker = Speaker(model, None, scheme, lambda: QuantizedCache(model.config, scheme))
    texts = {"prose": random_ids(1, 300)[0], "repeats": random_ids(1, 300)[0].clone()}
    texts["repeats"][-96:] = texts["prose"][:96]
    found = length.last_logits(speaker, texts, 200)
    for text, ids in texts.items():
        whole = torch.cat(list(Reader(speaker).logits(ids[-200:])))
        torch.testing.assert_close(found[text], whole[-97:-1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(found["prose"], found["repeats"])


def test_a_variant_that_is_not_there_is_named(length: ModuleType) -> None:
    assert length.scheme_of("octavo-2, K alone").value is None
    with pytest.raises(OctavoError, match="no variant 'K alnoe'; did you mean K alone") as caught:
        length.scheme_of("octavo-2, K alnoe")
    assert "\n" not in str(caught.value)


def record(file: Path, *rows: tuple[str, str, str, str, float, str]) -> None:
    """Write rows of (scheme, text, window, context, KL, tokens of the window)."""
    rest = {"model": "smollm2-135m", "bits": "4.5", "perplexity": "11", "float_perplexity": "10", "top1": "0.9"}
    with file.open("w", newline="", encoding="utf-8") as stream:
        fields = ("what", "text", "window", "context", "kl", "tokens")
        writer = csv.DictWriter(stream, (*rest, *fields))
        writer.writeheader()
        writer.writerows({**rest, **dict(zip(fields, row, strict=True))} for row in rows)


def test_a_ratio_is_of_the_same_windows(tables: ModuleType) -> None:
    assert "not measured yet" in tables.length_table()
    record(
        tables.FILE,
        *(("octavo-4", text, "0", context, kl, "8192") for text in ("prose", "repeats") for context, kl in
          (("2048", 0.002), ("4096", 0.9), ("8192", 0.003))),
        ("octavo-4", "prose", "1", "2048", 0.5, "8192"),
        ("octavo-4, K alone", "repeats", "0", "8192", 0.5, "8192"),
    )  # fmt: skip
    row = "| octavo-4 | 4.50 | 0.00200 | 0.00300 | 1.50 | 0.00200 | 0.00300 | 1.50 | +10.00 % | 90.0 % |"
    assert tables.length_table().splitlines()[2:3] == [row], "of the shortest context and the whole window"
    assert "K alone" not in tables.length_table(), "half of its rows are missing"


def test_each_length_of_windows_has_a_table(tables: ModuleType) -> None:
    record(
        tables.FILE,
        *(("octavo-4", text, "0", context, 0.001 * int(context) / 1024, tokens) for text in ("prose", "repeats")
          for tokens in ("8192", "16384") for context in ("2048", tokens)),
        *(("kivi-4", text, "0", context, 0.1, "32768") for text in ("prose", "repeats") for context in
          ("2048", "32768")),
    )  # fmt: skip
    first, second, third, other = tables.length_table().split("\n\n")
    for table, tokens, ratio in ((first, "8,192", "4.00"), (second, "16,384", "8.00"), (third, "32,768", "1.00")):
        assert table.startswith(f"| smollm2-135m | bits at {tokens} |") and f"| {ratio} |" in table.splitlines()[2]
    assert other == "qwen2.5-coder-0.5b: not measured yet."
    assert tables.length_digest().split("\n\n") == [first, second, other], "which leaves out those of others"
