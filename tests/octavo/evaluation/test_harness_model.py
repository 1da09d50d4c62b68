"""What lm-eval asks of a model with a cache of ours: contexts read once, long ones cut, and whole texts in windows."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from octavo.common.errors import OctavoError
from octavo.common.runtime.schemes.kv_scheme import CROP_ROOM
from octavo.generate import Speaker, load_stock, with_scheme

from ...support import TEXTS, random_ids, save_source, tiny_llama
from ...tolerances import TOLERANCES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning"),
]

LONGEST = 96
"""Tokens that the model is made for."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is made for few tokens."""
    return save_source(tmp_path_factory.mktemp("short"), tiny_llama(max_position_embeddings=LONGEST))


@pytest.fixture(scope="module")
def short(directory: Path) -> Speaker:
    """The same with a cache of ours, of floats."""
    return load_stock(directory, "float", None, "cpu")


@pytest.fixture(scope="module")
def stock(directory: Path) -> LlamaForCausalLM:
    """The same as transformers has it."""
    return LlamaForCausalLM.from_pretrained(directory).eval()


@pytest.fixture
def model_of() -> Callable[[Speaker], Any]:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm_eval")
    from octavo.evaluation.harness_model import HarnessModel

    return lambda speaker: HarnessModel(speaker, "tiny")


@torch.inference_mode()
def score(stock: LlamaForCausalLM, inputs: list[int], targets: list[int]) -> tuple[float, bool]:
    """Of the last `targets` behind `inputs`, in one pass without a cache: the log-probability, and whether greedy."""
    logits = stock(torch.tensor([inputs])).logits[0, -len(targets) :].log_softmax(-1)
    found = logits.gather(1, torch.tensor(targets)[:, None]).sum()
    return float(found), logits.argmax(-1).tolist() == targets


def close(value: float) -> Any:
    return pytest.approx(value, rel=TOLERANCES["logits"], abs=TOLERANCES["logits"])


def ids(count: int, seed: int = 1) -> list[int]:
    return random_ids(1, count, seed=seed)[0].tolist()


# Contexts and continuations


def test_a_context_is_read_once_for_all_its_continuations(
    short: Speaker, stock: LlamaForCausalLM, model_of: Callable[[Speaker], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is scored as if it were alone; one that is too long to be cropped again leaves no trace either."""
    read: list[int] = []
    forward = short.model.forward
    monkeypatch.setattr(short.model, "forward", lambda x, **rest: read.append(x.shape[1]) or forward(x, **rest))
    contexts = [ids(20), ids(20), ids(20), ids(9, seed=2), ids(20)]
    continuations = [ids(5, seed=3), ids(1, seed=4), ids(CROP_ROOM + 1, seed=5), ids(4, seed=6), ids(5, seed=3)]
    requests = [(None, *pair) for pair in zip(contexts, continuations, strict=True)]
    found = model_of(short)._loglikelihood_tokens(requests)
    assert read == [19, 5, 1, CROP_ROOM + 1, 8, 4, 19, 5]
    for (_, context, continuation), (total, greedy) in zip(requests, found, strict=True):
        expected, is_greedy = score(stock, (context + continuation)[:-1], continuation)
        assert total == close(expected) and greedy == is_greedy


@pytest.mark.parametrize("name", ["int8-token", "octavo-2"])
def test_of_a_quantized_cache_the_order_of_requests_says_nothing(
    name: str, short: Speaker, model_of: Callable[[Speaker], Any]
) -> None:
    model = model_of(with_scheme(short, name, None))
    requests = [(None, ids(40), ids(length, seed=length)) for length in (7, 2, CROP_ROOM, 3)]
    alone = [model._loglikelihood_tokens([request])[0] for request in requests]
    assert model._loglikelihood_tokens(requests) == [(close(total), greedy) for total, greedy in alone]
    float_ones = model_of(short)._loglikelihood_tokens(requests)
    assert any(abs(one - other) > 1e-4 for (one, _), (other, _) in zip(alone, float_ones, strict=True))


def test_a_continuation_that_greedy_decoding_writes_is_told(
    short: Speaker, stock: LlamaForCausalLM, model_of: Callable[[Speaker], Any]
) -> None:
    context, written = ids(10), []
    for _ in range(3):
        with torch.inference_mode():
            written.append(int(stock(torch.tensor([context + written])).logits[0, -1].argmax()))
    other = [*written[:2], (written[2] + 1) % 320]
    greedy = [
        found for _, found in model_of(short)._loglikelihood_tokens([(None, context, written), (None, context, other)])
    ]
    assert greedy == [True, False]


@pytest.mark.parametrize("length", [1, 5, LONGEST - 1, LONGEST])
def test_a_long_context_loses_its_beginning(
    length: int, short: Speaker, stock: LlamaForCausalLM, model_of: Callable[[Speaker], Any]
) -> None:
    """So that the model reads as many tokens as it is made for, the last of the continuation not among them."""
    context, continuation = ids(3 * LONGEST), ids(length, seed=2)
    ((total, _),) = model_of(short)._loglikelihood_tokens([(None, context, continuation)])
    inputs = (context + continuation)[-LONGEST - 1 : -1]
    assert len(inputs) == LONGEST and total == close(score(stock, inputs, continuation)[0])


def test_a_continuation_that_is_longer_than_the_model_is_refused(
    short: Speaker, model_of: Callable[[Speaker], Any]
) -> None:
    with pytest.raises(
        OctavoError, match=f"an answer of {LONGEST + 1} tokens, and the model is made for {LONGEST} in all"
    ):
        model_of(short)._loglikelihood_tokens([(None, ids(4), ids(LONGEST + 1))])


# Whole texts


def windows_of(tokens: list[int], prefix: int) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets: full windows side by side, and a last one with as much context as there is room for."""
    whole, found = [prefix, *tokens], []
    for start in range(0, len(tokens), LONGEST):
        stop = min(start + LONGEST, len(tokens))
        found.append((whole[max(0, stop - LONGEST) : stop], tokens[start:stop]))
    return found


@pytest.mark.parametrize("length", [1, LONGEST - 1, LONGEST, LONGEST + 1, 2 * LONGEST + 30])
def test_whole_texts_are_scored_in_windows(
    length: int,
    short: Speaker,
    stock: LlamaForCausalLM,
    model_of: Callable[[Speaker], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each token once, the first of all behind the token that begins texts."""
    model, tokens = model_of(short), ids(length)
    monkeypatch.setattr(model, "tok_encode", lambda text: tokens)
    windows = windows_of(tokens, short.tokenizer.bos_token_id)
    assert sum(len(targets) for _, targets in windows) == length
    found = model.loglikelihood_rolling([SimpleNamespace(args=("text",))] * 2)
    assert found == [close(sum(score(stock, *window)[0] for window in windows))] * 2


def test_a_text_without_tokens_has_the_probability_1(short: Speaker, model_of: Callable[[Speaker], Any]) -> None:
    assert model_of(short).loglikelihood_rolling([SimpleNamespace(args=("",))]) == [0]


# What is written


def written_by(model: Any, text: str, tokens: int) -> str:
    wanted = {"until": [], "max_gen_toks": tokens, "do_sample": False}
    return model.generate_until([SimpleNamespace(args=(text, wanted))])[0]


def test_a_long_context_leaves_room_for_what_is_written(
    short: Speaker, stock: LlamaForCausalLM, model_of: Callable[[Speaker], Any]
) -> None:
    model, text = model_of(short), " ".join(TEXTS)
    tokens = model.tok_encode(text)
    assert len(tokens) > LONGEST
    kept = torch.tensor([tokens[-LONGEST + 12 :]])
    expected = stock.generate(kept, attention_mask=torch.ones_like(kept), max_new_tokens=12, do_sample=False)
    assert written_by(model, text, 12) == model.tokenizer.decode(expected[0, LONGEST - 12 :], skip_special_tokens=True)


def test_answers_without_room_for_a_context_are_refused(short: Speaker, model_of: Callable[[Speaker], Any]) -> None:
    with pytest.raises(OctavoError, match=f"an answer of {LONGEST} tokens, and the model is made for {LONGEST} in all"):
        written_by(model_of(short), "Rain fell", LONGEST)
