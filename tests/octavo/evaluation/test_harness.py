"""Tasks of lm-eval through the quantized cache: of floats, equal to lm-eval's own model with transformers' cache."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from octavo.evaluation.harness import TaskScore, paired_interval, run_tasks, tasks_json, tasks_table
from octavo.generate import Speaker, load_stock, with_scheme

from ...support import TEXTS, tiny_tokenizer
from ...tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}} Was it so? Answer:"
doc_to_choice: [" yes, it was", " no"]
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{label}}}}"
generation_kwargs: {{until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    pytest.importorskip("accelerate", reason="lm-eval's own model needs accelerate")
    return pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm_eval")


@pytest.fixture(scope="module")
def reference(source: Path) -> Speaker:
    return load_stock(source, "float", None, "cpu")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two tasks, and the data of both."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": index % 2}) + "\n" for index, text in enumerate(TEXTS)))
    for name, text in (("choice", CHOICE), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    return [str(tmp_path / "choice.yaml"), str(tmp_path / "writing.yaml")]


def responses(lm_eval: Any, model: Any, files: list[str]) -> dict[str, list[Any]]:
    """What a model answered, by task, in the order of questions."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=files, task_manager=manager, bootstrap_iters=0)["samples"]
    return {task: [each["resps"] for each in samples if each["filter"] == "none"] for task, samples in found.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")
def test_of_floats_all_is_as_with_lm_evals_own_model(
    lm_eval: Any, reference: Speaker, source: Path, files: list[str]
) -> None:
    from lm_eval.models.huggingface import HFLM

    from octavo.evaluation.harness_model import HarnessModel

    stock = HFLM(AutoModelForCausalLM.from_pretrained(source).eval(), tokenizer=tiny_tokenizer(), batch_size=1)
    expected, found = (responses(lm_eval, each, files) for each in (stock, HarnessModel(reference, "float")))
    assert found["tiny_writing"] == expected["tiny_writing"] and any(map(str, found["tiny_writing"]))
    for one, other in zip(expected["tiny_choice"], found["tiny_choice"], strict=True):
        for ((score, greedy),), ((own_score, own_greedy),) in zip(one, other, strict=True):
            assert own_score == pytest.approx(score, rel=TOLERANCES["logits"], abs=TOLERANCES["logits"])
            assert own_greedy == greedy


@pytest.mark.slow
@pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")
def test_a_table_has_each_metric_of_each_task(lm_eval: Any, reference: Speaker, files: list[str]) -> None:
    speakers = {"float": reference, "octavo-2": with_scheme(reference, "octavo-2", None)}
    scores = run_tasks(speakers, files)
    assert set(scores["float"]) == {
        ("tiny_choice", "acc"), ("tiny_choice", "acc_norm"), ("tiny_writing", "exact_match")
    }  # fmt: skip
    assert all(len(score.samples) == len(TEXTS) for score in scores["float"].values())
    lines = tasks_table(scores)
    assert len(lines) == 4 and lines[0].split()[:4] == ["task", "metric", "questions", "model"]
    json.dumps(tasks_json(scores))


# Intervals


def test_the_interval_of_a_difference_is_of_pairs() -> None:
    """By hand: 2 lost and none won of 8, half an answer more of each."""
    one, other = TaskScore(0.75, (1.0,) * 6 + (0.0,) * 2), TaskScore(0.5, (1.0,) * 4 + (0.0,) * 4)
    error = math.sqrt(0.5 + 2.5 - 4 / 10) / 10
    assert paired_interval(one, other) == pytest.approx((-0.2 - 1.959964 * error, -0.2 + 1.959964 * error))
    low, high = paired_interval(one, one)
    assert low == pytest.approx(-high) and high > 0.1  # eight questions on which both agree are no certainty
    shifted = TaskScore(1.0, tuple(score + 0.25 for score in one.samples))
    assert paired_interval(one, shifted) == pytest.approx((0.25, 0.25))
    assert paired_interval(one, TaskScore(0.5, ())) is None


def test_scores_that_are_no_means_have_no_interval() -> None:
    assert TaskScore(12.5, ()).interval is None
    assert TaskScore(0.5, (0.25, 0.75)).interval == pytest.approx((0.5 - 1.959964 / 4, 0.5 + 1.959964 / 4))
    lines = tasks_table(
        {"float": {("t", "perplexity"): TaskScore(12.5, ())}, "s": {("t", "perplexity"): TaskScore(13, ())}}
    )
    assert "+0.5000" in lines[1] and "to" not in lines[1].split()
