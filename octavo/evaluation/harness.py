"""Tasks of lm-eval, from files or by the names of those that come with it, asked of models with quantized caches.

What a task scores question by question is compared question by question: all models see the same ones.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..common.command import aligned
from ..common.errors import OctavoError, did_you_mean, first_line
from ..generate import Speaker
from .recall import TASKS, Score, Z

INSTALL = "pip install lm_eval"
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task.

    Attributes:
        value: as lm-eval tells it, of all questions.
        samples: of each question, if the value is their mean; none otherwise.
    """

    value: float
    samples: tuple[float, ...]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % of the value: Wilson's of answers that are right or wrong, else by the normal distribution."""
        if len(self.samples) < 2:
            return None
        if set(self.samples) <= {0.0, 1.0}:
            return Score(int(sum(self.samples)), len(self.samples)).interval
        return _around(self.value, stdev(self.samples) / math.sqrt(len(self.samples)))


def _around(middle: float, error: float) -> tuple[float, float]:
    return middle - Z * error, middle + Z * error


def paired_interval(one: TaskScore, other: TaskScore) -> tuple[float, float] | None:
    """95 % of by how much the other is above the one, on the same questions.

    Of answers that are right or wrong by Agresti and Min (2005), who add half an answer to each of the four cases, so
    that few questions on which both agree do not look like certainty.
    """
    count = len(one.samples)
    if count < 2 or len(other.samples) != count:
        return None
    apart = [b - a for a, b in zip(one.samples, other.samples, strict=True)]
    if not {*one.samples, *other.samples} <= {0.0, 1.0}:
        return _around(mean(apart), stdev(apart) / math.sqrt(count))
    won, lost, all_ = apart.count(1.0) + 0.5, apart.count(-1.0) + 0.5, count + 2
    return _around((won - lost) / all_, math.sqrt(won + lost - (won - lost) ** 2 / all_) / all_)


def split_tasks(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tasks of recall, and those of lm-eval, each once.

    Raises:
        OctavoError: a file is missing, or lm-eval is, for names that are not of recall.
    """
    unique = tuple(dict.fromkeys(names))
    own, others = tuple(name for name in unique if name in TASKS), tuple(name for name in unique if name not in TASKS)
    for name in others:
        if name.endswith(SUFFIXES) and not Path(name).is_file():
            raise OctavoError(f"--tasks {name}: no such file; give a task file of lm-eval, or {', '.join(TASKS)}")
    if others and find_spec("lm_eval") is None:
        raise OctavoError(f"--tasks {others[0]}: needs lm-eval; {INSTALL}{did_you_mean(others[0], TASKS)}")
    return own, others


def run_tasks(
    speakers: Mapping[str, Speaker],
    names: Sequence[str],
    limit: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[tuple[str, str], TaskScore]]:
    """What models reach in tasks of lm-eval, by task and metric.

    Args:
        names: files, or names of tasks that come with lm-eval, whose data it fetches.
        limit: ask the first so many questions of each; None for all.
        tell: is told what each model reached once it is known, in lines.

    Raises:
        OctavoError: a task cannot be loaded.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from .harness_model import HarnessModel

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=not all(name.endswith(SUFFIXES) for name in names))
    for name in names:
        try:
            manager.load([name])
        except Exception as error:  # of a task's data and templates anything can be wrong
            near = "" if name.endswith(SUFFIXES) else did_you_mean(name, [*TASKS, *manager.all_tasks])
            raise OctavoError(f"--tasks {name}: lm-eval cannot load it ({first_line(error)}){near}") from None
    found = {}
    for name, speaker in speakers.items():
        done = simple_evaluate(
            HarnessModel(speaker, name), tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0
        )
        found[name] = _scores(done)
        for (task, metric), score in found[name].items():
            tell(f"{task}, {name}: {metric} {_told(score.value, score.interval)}")
    return found


def _scores(done: Mapping[str, Any]) -> dict[tuple[str, str], TaskScore]:
    found = {}
    for task, metrics in done["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                samples = [each for each in done["samples"].get(task, ()) if each["filter"] == kind]
                told = metric if kind == "none" else f"{metric} ({kind})"
                found[task, told] = TaskScore(float(value), _means(float(value), metric, samples))
    return found


def _means(value: float, metric: str, samples: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """The scores of the questions, in their order, if the value is their mean."""
    each = [sample.get(metric) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    if not each or not all(isinstance(score, (int, float)) for score in each):
        return ()
    numbers = tuple(map(float, each))
    return numbers if math.isclose(mean(numbers), value, abs_tol=1e-9) else ()


def tasks_table(scores: Mapping[str, Mapping[tuple[str, str], TaskScore]]) -> list[str]:
    """Lines of a table: each metric of each task, of float and of each other model, and their difference."""
    (plain, expected), *others = scores.items()
    rows = [["task", "metric", "questions", "model", plain, "quantized", "difference"]]
    for (task, metric), score in expected.items():
        for name, found in others or [("", expected)]:
            other = found[task, metric]
            apart = other.value - score.value
            cells = ["", ""] if not others else [_told(other.value, other.interval), _told(apart, None, "+.4f")]
            if others and (interval := paired_interval(score, other)) is not None:
                cells[1] = _told(apart, interval, "+.4f")
            rows.append([task, metric, str(len(score.samples) or ""), name, _told(score.value, score.interval), *cells])
    return aligned(rows, texts=2)


def _told(value: float, interval: tuple[float, float] | None, form: str = ".4f") -> str:
    span = "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"
    return f"{value:{form}}{span}"


def tasks_json(scores: Mapping[str, Mapping[tuple[str, str], TaskScore]]) -> list[dict[str, Any]]:
    """The same as plain data, with the intervals."""
    plain = next(iter(scores.values()))
    return [
        {
            "model": name,
            "task": task,
            "metric": metric,
            "value": score.value,
            "interval": score.interval,
            "difference": score.value - plain[task, metric].value,
            "difference_interval": paired_interval(plain[task, metric], score),
            "samples": score.samples,
        }
        for name, found in scores.items()
        for (task, metric), score in found.items()
    ]
