"""An evaluation: equal to what the pieces of the library compute, and sensitive to what it is to find."""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from octavo.common.convert.measure.fidelity import compare
from octavo.common.errors import OctavoError
from octavo.evaluation.evaluating import Plan, evaluate
from octavo.evaluation.reading import CHUNK, Reader, Times, _token
from octavo.evaluation.recall import ASKED, ROOM, TASKS, Score, key_values, needles, prompts_of, recall
from octavo.evaluation.report import cost_table, quality_table, writing_table
from octavo.evaluation.text import Kept, compare_on_text, in_chunks
from octavo.evaluation.writing import compare_writing
from octavo.generate import Speaker, load_stock, with_scheme

from ...support import TEXTS, random_ids, tiny_tokenizer, with_cache

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = Plan(" ".join(TEXTS) * 4, 1, 80, 0, ("key-value",), (300,), 4, 6, 2)


@pytest.fixture(scope="module")
def reference(source: Path) -> Speaker:
    return load_stock(source, "float", None, "cpu")


@pytest.fixture(scope="module")
def others(reference: Speaker) -> dict[str, Speaker]:
    return {name: with_scheme(reference, name, None) for name in ("int8-token", "octavo-2")}


def test_scores_on_text_are_those_of_whole_passes(reference: Speaker, others: dict[str, Speaker], source: Path) -> None:
    """Read chunk by chunk, side by side, over several chunks."""
    ids = random_ids(1, CHUNK + 40)
    stock = AutoModelForCausalLM.from_pretrained(source).eval()
    found = compare_on_text(reference, others, [ids[0]])
    for name, speaker in others.items():
        expected = compare(
            lambda sample: stock(sample).logits,
            lambda sample, speaker=speaker: torch.cat(list(Reader(speaker).logits(sample[0])))[None],
            [ids],
        )
        assert found[name].tokens == expected.tokens == CHUNK + 39
        assert found[name].kl == pytest.approx(expected.kl, rel=1e-3)
        assert found[name].float_perplexity == pytest.approx(expected.float_perplexity, rel=1e-5)
    assert 0 < found["int8-token"].kl < found["octavo-2"].kl


def test_the_last_tokens_alone_are_scored(reference: Speaker, others: dict[str, Speaker]) -> None:
    ids = random_ids(1, CHUNK + 40)[0]
    found = compare_on_text(reference, others, [ids], last=60)
    assert {score.tokens for score in found.values()} == {60}
    with pytest.raises(OctavoError, match="text: nothing to compare"):
        compare_on_text(reference, others, [ids[:1]])


def test_what_the_float_model_says_is_kept_as_far_as_there_is_room(
    reference: Speaker, others: dict[str, Speaker]
) -> None:
    windows = [random_ids(1, CHUNK + 40, seed=seed)[0] for seed in (1, 2)]
    read: list[int] = []

    def counted(ids: torch.Tensor) -> Iterator[torch.Tensor]:
        read.append(len(ids))
        return in_chunks(reference)(ids)

    size = sum(part.nbytes for part in counted(windows[0]))
    wanted = compare_on_text(reference, others, windows)
    for most, passes in ((2 * size, 2), (2 * size - 1, 3), (0, 4)):
        read.clear()
        expected = Kept(counted, most)
        for name, speaker in others.items():
            found = compare_on_text(reference, {name: speaker}, windows, expected=expected)
            assert found == {name: wanted[name]}
        assert len(read) == passes


def test_writing_departs_where_greedy_texts_differ(reference: Speaker, others: dict[str, Speaker]) -> None:
    ids = random_ids(1, 30)[0]
    same = {"float": with_scheme(reference, "float", None), **others}
    found = compare_writing(reference, same, [ids, ids[5:]], 12)
    assert found["float"].first == (12, 12) and found["float"].same == 2 and found["float"].mean == 12
    written = []
    for speaker in (reference, others["octavo-2"]):
        out = speaker.model.generate(
            ids[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=2,
            **with_cache(speaker.new_cache()),
        )  # fmt: skip
        written.append(out[0, 30:])
    differs = (written[0] != written[1]).nonzero()
    assert found["octavo-2"].first[0] == (int(differs[0]) if len(differs) else 12)


def test_what_is_longer_than_the_model_is_refused(reference: Speaker) -> None:
    long = dataclasses.replace(PLAN, lengths=(5000,))
    with pytest.raises(OctavoError, match="--lengths 5000: the model is made for 4,096 tokens; give 4096 at most"):
        evaluate(reference, {}, long)
    with pytest.raises(OctavoError, match="--length 4097: the model"):
        evaluate(reference, {}, dataclasses.replace(PLAN, length=4097))
    with pytest.raises(OctavoError, match=r"--written 4090: .* give 4032 at most behind prompts of 64"):
        evaluate(reference, {}, dataclasses.replace(PLAN, written=4090))


def test_sampled_texts_share_their_random_numbers(reference: Speaker, others: dict[str, Speaker]) -> None:
    """The float scheme samples the same text; what is told of a model is against float's own text."""
    prompts = [random_ids(1, 30, seed=seed)[0] for seed in range(2)]
    same = {"float": with_scheme(reference, "float", None), **others}
    found = compare_writing(reference, same, prompts, 12, with_sampled=True)
    assert found["float"].sampled == (12, 12) and found["float"].kl == pytest.approx(0, abs=1e-6)
    assert found["octavo-2"].kl > found["int8-token"].kl > 0 and len(found["octavo-2"].sampled) == 2


def test_gumbel_noise_samples_the_softmax() -> None:
    logits, chance = torch.tensor([0.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([_token(logits, chance) for _ in range(4000)])) / 4000
    assert torch.allclose(counts.float(), logits.softmax(-1), atol=0.03)


# Recall


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("length", [300, 900])
def test_prompts_fill_their_length_and_hold_the_answers(task: str, length: int) -> None:
    tokenizer = tiny_tokenizer()
    prompts = prompts_of(task, tokenizer, length, 13)
    assert [len(prompt.questions) for prompt in prompts][:-1] == [min(ASKED, len(prompts[0].questions))] * (
        len(prompts) - 1
    )
    assert sum(len(prompt.questions) for prompt in prompts) == 13 and prompts[0] != prompts[1]
    for prompt in prompts:
        size = len(tokenizer(prompt.text)["input_ids"])
        assert length - ROOM - 200 < size <= length - ROOM
        for question, answer in prompt.questions:
            key = question.split("the ", 2)[-1].removesuffix(" is")
            assert f"{key} is {answer}." in prompt.text
    assert prompts == prompts_of(task, tokenizer, length, 13)


def test_keys_differ_however_many_there_are() -> None:
    lines = key_values(1000, random.Random(0)).text.splitlines()[1:]
    assert len({line.rpartition(" is ")[0] for line in lines}) == 1000
    assert len(needles(3, random.Random(0)).questions) == 3


def test_what_is_too_short_is_refused() -> None:
    with pytest.raises(OctavoError, match="--lengths 60: too short for needles"):
        prompts_of("needles", tiny_tokenizer(), 60, 5)


def test_recall_counts_the_answers_that_begin_with_the_value(
    reference: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that tells even numbers rightly, and of odd ones their digits from behind."""
    prompts = prompts_of("key-value", reference.tokenizer, 300, 5)
    told = [answer for prompt in prompts for _, answer in prompt.questions]
    answers = iter(told)

    def text_of(self: Reader, ids: list[int]) -> str:
        answer = next(answers)
        return f" {answer}, and" if int(answer) % 2 == 0 else f" {answer[::-1]}"

    monkeypatch.setattr(Reader, "text_of", text_of)
    times = Times()
    score, nbytes = recall(reference, prompts, times=times)
    assert score == Score(sum(answer == answer[::-1] or int(answer) % 2 == 0 for answer in told), 5)
    assert 0 < score.right < 5 and nbytes > 0
    assert len(times.prompts) == len(prompts) and times.step > 0 and times.prompt_speed > 0


def test_a_question_leaves_the_prompt_as_it_was(others: dict[str, Speaker]) -> None:
    for speaker in others.values():
        ids, question = random_ids(1, 200)[0], random_ids(1, 20, seed=3)[0]
        reader = Reader(speaker)
        reader.read(ids)
        first = reader.write(reader.read(question), 8)
        reader.forget(200)
        assert reader.cache.get_seq_length() == 200
        assert reader.write(reader.read(question), 8) == first


def test_the_interval_is_wilsons() -> None:
    low, high = Score(20, 20).interval
    assert (low, high) == (pytest.approx(0.8389, abs=1e-4), 1.0)
    assert Score(10, 20).interval == (pytest.approx(0.2993, abs=1e-4), pytest.approx(0.7007, abs=1e-4))


# All of it


def test_an_evaluation_has_a_row_for_each_model(reference: Speaker, others: dict[str, Speaker]) -> None:
    results = evaluate(reference, others, PLAN)
    assert list(results) == ["float", "int8-token", "octavo-2"]
    assert results["float"].fidelity is None and results["float"].bits == 32
    assert results["octavo-2"].fidelity.kl > results["int8-token"].fidelity.kl > 0
    assert results["int8-token"].cache_bytes[300] < results["float"].cache_bytes[300]
    assert all(result.recall["key-value", 300].asked == 4 for result in results.values())
    lines = quality_table(results)
    assert lines[0].split() == ["bits", "KL", "perplexity", "top-1", "key-value", "300", "as", "float", "for"]
    assert len(lines) == 4 and lines[1].startswith("float")
    assert len({len(line) for line in lines[2:]}) == 1
    assert writing_table(results)[1].split()[0] == "int8-token" and len(writing_table(results)) == 3
    peak = results["float"].peak_bytes[300]  # None where the system does not tell
    assert peak is None or peak > results["float"].cache_bytes[300]
    assert "cache at 300, MB" in cost_table(results)[0] and len(cost_table(results)) == 4


def test_a_reader_is_what_the_model_is(source: Path) -> None:
    """Of the float scheme: the logits of transformers' own cache."""
    speaker = load_stock(source, "float", None, "cpu")
    stock = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = random_ids(1, 50)
    with torch.inference_mode():
        expected = stock(ids, **with_cache(DynamicCache(config=stock.config))).logits[0]
    assert torch.allclose(torch.cat(list(Reader(speaker).logits(ids[0]))), expected, atol=1e-4)
    assert torch.allclose(Reader(speaker).read(ids[0]), expected[-1], atol=1e-4)
