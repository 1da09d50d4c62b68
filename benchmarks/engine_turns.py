"""The stages of `engines.py`: forms of the models, KL, turns, and rows; what was done stands in a journal."""

import hashlib
import itertools
import json
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_cases import CONTENDERS, Contender
from engine_files import Model, prepared, slug, start
from engine_process import EngineFailure
from rows import RESULTS, Row, append_rows
from transformers import AutoTokenizer

from octavo.common.convert.measure.fidelity import ROWS, Comparison, windows
from octavo.common.convert.output.bundle import code_digest, commit
from octavo.machine import device_name

FILE = "engines.csv"
COLUMNS = ("commit", "machine", "threads", "isa", "model", "batch", "context", "kind", "contender", "system", "rounds",
           "steps", "first_s", "step_ms", "step_p20_ms", "step_p80_ms", "peak_mb", "others_cpus", "kl", "top1",
           "windows", "note")  # fmt: skip
WINDOW, CHUNK = 2048, 64
"""Tokens of a window that KL is taken on, and of a pass over its second half."""
WARM_UP = (64, 4)
"""Tokens and steps before what is timed."""
ROOM = 8
"""Tokens that a cache has beside the prompt and the steps."""
LOAD_SECONDS, MEASURE_SECONDS = 900.0, 3600.0
MOST_OF_OTHERS = 0.1
"""CPUs that other processes take, at most, while a turn is timed; else it is tried again."""
RANDOM_CONTEXTS = (2048,)
"""Contexts of the model of random weights."""

Record = dict[str, Any]
Key = tuple[Any, ...]


class Journal:
    """Records of what was done under some conditions, a line each in a file.

    Raises:
        SystemExit: the file is of other conditions.
    """

    def __init__(self, file: Path, conditions: Record, again: bool = False) -> None:
        self._file, self._records = file, {}
        if file.exists() and not again:
            found, *records = map(json.loads, file.read_text(encoding="utf-8").splitlines())
            other = [name for name in conditions if found.get(name) != conditions[name]]
            if other:
                raise SystemExit(f"error: {file}: is of another {', '.join(other)}; --again starts it anew")
            self._records = {tuple(record["key"]): record for record in records}
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(conditions) + "\n", encoding="utf-8")

    def get(self, *key: Any) -> Record | None:
        """The record of a key."""
        return self._records.get(key)

    def add(self, *key: Any, **record: Any) -> None:
        """Keep a record."""
        self._records[key] = {"key": key, **record}
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(self._records[key]) + "\n")


def divergence(reference: list[Path], found: list[Path], samples: list[list[int]]) -> tuple[float, float]:
    """KL in nats and top-1 agreement of files of logits behind the first halves of windows."""
    comparison = Comparison()
    for expected_file, actual_file, ids in zip(reference, found, samples, strict=True):
        expected, actual = (np.load(file, mmap_mode="r") for file in (expected_file, actual_file))
        targets = torch.tensor(ids[len(ids) // 2 + 1 :])
        for first in range(0, len(targets), ROWS):
            part = slice(first, min(first + ROWS, len(targets)))
            pair = [torch.from_numpy(np.array(logits[part])) for logits in (expected, actual)]
            comparison.add(*pair, targets[part])
    return comparison.fidelity().kl, comparison.fidelity().top1


class Run:
    """One comparison: its stages, each of which says whether all of it is done."""

    def __init__(self, flags: Namespace, models: list[Model]) -> None:
        self.flags, self.models = flags, models
        self.tree, self.machine = commit(), device_name(torch.device("cpu"))
        self.failures: dict[tuple[str, str], str] = {}
        """Reasons by names of model and contender."""
        self._ids: dict[str, torch.Tensor] = {}

    @cached_property
    def journal(self) -> Journal:
        """What was scored and timed on this machine, with this code."""
        flags = self.flags
        conditions = {"code": code_digest(), "machine": self.machine, "threads": flags.threads, "isa": flags.isa}
        return Journal(flags.work / f"journal-{flags.isa}.jsonl", conditions, flags.again)

    def _contenders(self) -> Iterator[tuple[Model, Contender]]:
        """Those that have not failed yet."""
        for model, contender in itertools.product(self.models, self.flags.contenders):
            if (model.name, contender.name) not in self.failures:
                yield model, contender

    def _fail(self, model: Model, contender: Contender, reason: object) -> None:
        self.failures[model.name, contender.name] = str(reason)
        print(f"{model.name}, {contender.name} is skipped: {reason}", flush=True)

    def tell_failures(self) -> None:
        """Say once more what was skipped."""
        for (model, contender), reason in self.failures.items():
            print(f"no figure: {model}, {contender}: {reason}", flush=True)

    def text(self, model: Model) -> torch.Tensor:
        """Ids `[N]` of the text."""
        if model.name not in self._ids:
            tokenizer = AutoTokenizer.from_pretrained(model.directory)
            text = self.flags.eval_file.read_text(encoding="utf-8")
            self._ids[model.name] = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        return self._ids[model.name]

    def prepare(self) -> bool:
        """Make what the contenders load."""
        for model, contender in self._contenders():
            try:
                prepared(contender, model, self.flags)
            except EngineFailure as failure:
                self._fail(model, contender, failure)
        return True

    def _load(self, worker: Any, contender: Contender, model: Model, tokens: int, batch: int) -> str:
        ours = {"architecture": model.architecture} if contender.flags else {}
        sizes = {"tokens": tokens, "batch": batch, "threads": self.flags.threads}
        directory = str(prepared(contender, model, self.flags))
        return worker.ask("load", LOAD_SECONDS, directory=directory, **sizes, **ours, **contender.loading)

    def _logits(self, contender: Contender, model: Model, samples: list[list[int]], into: list[Path]) -> None:
        with start(contender.engine, self.flags, f"{model.name}-{slug(contender.name)}-score") as worker:
            self._load(worker, contender, model, WINDOW + ROOM, 1)
            for ids, file in zip(samples, into, strict=True):
                worker.ask("logits", MEASURE_SECONDS, ids=ids, prompt=WINDOW // 2, chunk=CHUNK, into=str(file))

    def _reference(self, model: Model, samples: list[list[int]]) -> list[Path]:
        """Logits of the float model, kept from run to run."""
        names = [hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] for ids in samples]
        files = [self.flags.work / model.name / f"logits-{name}.npy" for name in names]
        if not all(file.exists() for file in files):
            floats = next(one for one in CONTENDERS if one.engine == "transformers")
            files[0].parent.mkdir(parents=True, exist_ok=True)
            self._logits(floats, model, samples, files)
        return files

    def score(self) -> bool:
        """KL of each contender."""
        for model, contender in self._contenders():
            key = ("score", model.name, contender.name, self.flags.windows)
            if model.is_random or self.journal.get(*key):
                continue
            samples = [ids[0].tolist() for ids in windows(self.text(model), WINDOW, self.flags.windows)]
            with tempfile.TemporaryDirectory(dir=self.flags.work) as folder:
                found = [Path(folder, f"{index}.npy") for index in range(len(samples))]
                try:
                    reference = self._reference(model, samples)
                    self._logits(contender, model, samples, found)
                except EngineFailure as failure:
                    print(f"{model.name}, {contender.name} has no KL: {failure}", flush=True)
                    continue
                kl, top1 = divergence(reference, found, samples)
            self.journal.add(*key, kl=kl, top1=top1)
            print(f"{model.name}, {contender.name}: KL {kl:.5f}", flush=True)
        return True

    def _turn(self, model: Model, contender: Contender, context: int) -> Record:
        """Load, warm up, and time a prompt and steps behind it."""
        ids, new, batch = self.text(model), self.flags.new, self.flags.batch
        prompts = [sample[0].tolist() for sample in windows(ids, context, batch)]
        warm, warm_steps = WARM_UP
        with start(contender.engine, self.flags, f"{model.name}-{slug(contender.name)}-{context}") as worker:
            system = self._load(worker, contender, model, context + new + ROOM, batch)
            worker.ask("measure", LOAD_SECONDS, prompts=[ids[-warm:].tolist()] * batch, new=warm_steps)
            began, before = time.perf_counter(), worker.others_seconds()
            found = worker.ask("measure", MEASURE_SECONDS, prompts=prompts, new=new)
            taken, after = time.perf_counter() - began, worker.others_seconds()
            others = 0.0 if before is None else max((after - before) / taken, 0.0)
            return {**found, "system": system, "peak": worker.peak, "others": others}

    def _quiet_turn(self, model: Model, contender: Contender, context: int) -> Record:
        """A turn in which other processes took little, or of some tries that in which they took least."""
        tries = []
        while not tries or (tries[-1]["others"] > MOST_OF_OTHERS and len(tries) < self.flags.tries):
            tries.append(self._turn(model, contender, context))
        return min(tries, key=lambda record: record["others"])

    def _wanted(self) -> Iterator[tuple[Model, Contender, int, Key]]:
        """Turns that are to be done: contenders in turns, round after round."""
        for context, rounds in zip(self.flags.contexts, self.flags.rounds, strict=True):
            for model in self.models:
                if model.is_random and context not in RANDOM_CONTEXTS:
                    continue
                for index, contender in itertools.product(range(rounds), self.flags.contenders):
                    yield model, contender, context, self._key(model, contender, context, index)

    def _key(self, model: Model, contender: Contender, context: int, index: int) -> Key:
        return ("time", model.name, contender.name, context, self.flags.batch, self.flags.new, index)

    def time(self) -> bool:
        """Do the turns, or as many of them as the flags let."""
        left = self.flags.turns
        for model, contender, context, key in self._wanted():
            if (model.name, contender.name) in self.failures or self.journal.get(*key):
                continue
            if not left:
                return False
            left -= 1
            try:
                record = self._quiet_turn(model, contender, context)
            except EngineFailure as failure:
                self._fail(model, contender, failure)
                continue
            self.journal.add(*key, **record)
            first = "" if record["first"] is None else f", first token {record['first']:.2f} s"
            step = 1e3 * statistics.median(record["steps"])
            noise = f", others took {record['others']:.2f} CPUs" if record["others"] > MOST_OF_OTHERS else ""
            print(f"{model.name}, {context}, {contender.name}: {step:.2f} ms a step{first}{noise}", flush=True)
        return True

    def _row(self, model: Model, contender: Contender, context: int, rounds: int) -> Row:
        """Medians over the rounds, as far as there are any."""
        keys = [self._key(model, contender, context, index) for index in range(rounds)]
        turns = [turn for key in keys if (turn := self.journal.get(*key))]
        score = self.journal.get("score", model.name, contender.name, self.flags.windows) or {}
        figures: Record = {"note": self.failures.get((model.name, contender.name), "")}
        if turns:
            figures |= medians(turns)
        if score:
            figures |= {"kl": f"{score['kl']:.6f}", "top1": f"{score['top1']:.4f}", "windows": self.flags.windows}
        flags = self.flags
        places = (self.tree, self.machine, flags.threads, flags.isa, model.name, flags.batch, context, contender.kind,
                  contender.name)  # fmt: skip
        row = {**dict.fromkeys(COLUMNS, ""), **dict(zip(COLUMNS, places, strict=False)), **figures}
        return {column: str(value) for column, value in row.items()}

    def report(self) -> bool:
        """Append a row for each model, context and contender."""
        cases = {(model.name, one.name, context): (model, one, context) for model, one, context, _ in self._wanted()}
        rounds = dict(zip(self.flags.contexts, self.flags.rounds, strict=True))
        rows = [self._row(model, contender, context, rounds[context]) for model, contender, context in cases.values()]
        append_rows(RESULTS / FILE, COLUMNS, rows)
        return True


def medians(turns: list[Record]) -> Record:
    """Columns of the figures of turns."""
    steps = [1e3 * step for turn in turns for step in turn["steps"]]
    tenths = statistics.quantiles(steps, n=10)
    firsts = [turn["first"] for turn in turns if turn["first"] is not None]
    peaks = [turn["peak"] for turn in turns if turn["peak"] is not None]
    return {
        "system": turns[-1]["system"],
        "rounds": len(turns),
        "steps": len(steps),
        "first_s": f"{statistics.median(firsts):.3f}" if firsts else "",
        "step_ms": f"{tenths[4]:.3f}",
        "step_p20_ms": f"{tenths[1]:.3f}",
        "step_p80_ms": f"{tenths[7]:.3f}",
        "others_cpus": f"{max(turn['others'] for turn in turns):.2f}",
        "peak_mb": f"{statistics.median(peaks) / 1e6:.0f}" if peaks else "",
    }
