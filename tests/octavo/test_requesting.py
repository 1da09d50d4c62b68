"""Requests of OpenAI's API: what is refused, what samples, and where an answer ends."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from transformers import GenerationConfig

from octavo.requesting import (
    RequestRefused,
    StopFilter,
    check_request,
    cut_answer,
    cut_stream,
    error_form,
    set_sampling,
    stops_of,
)


@pytest.mark.parametrize(
    ("body", "samples"),
    [
        ({"temperature": 0.7}, True),
        ({"temperature": 0}, False),
        ({"temperature": 0, "top_p": 0.5}, False),
        ({"top_p": 0.5}, True),
        ({"top_p": 1}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("usual", [True, False])
def test_a_request_says_whether_it_samples_and_else_the_config_does(
    body: dict[str, Any], samples: bool | None, usual: bool
) -> None:
    config = GenerationConfig(do_sample=usual, temperature=body.get("temperature"), top_p=body.get("top_p"))
    set_sampling(config, {**body, "seed": 3})
    assert config.do_sample is (usual if samples is None else samples) and config.seed == 3
    assert (config.temperature, config.top_p) == ((body.get("temperature"), body.get("top_p")) if config.do_sample
                                                  else (None, None))  # fmt: skip


REFUSED = [
    ("n", 2), ("best_of", 3), ("echo", True), ("suffix", "end"), ("logprobs", True), ("logprobs", 0),
    ("top_logprobs", 4), ("presence_penalty", 0.5), ("frequency_penalty", -1), ("tool_choice", "required"),
    ("response_format", {"type": "json_object"}), ("temperature", -1), ("temperature", "hot"), ("top_p", 1.5),
    ("seed", 2**70), ("seed", 1.5), ("stop", 5), ("stop", ["a", None]), ("model", "another"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=str)
def test_what_is_not_served_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(RequestRefused, match=f"^{field}: ") as refused:
        check_request({field: value}, "mine")
    assert error_form(str(refused.value), refused.value.param)["error"]["param"] == field


def test_what_asks_for_nothing_is_taken() -> None:
    neutral = {"n": 1, "logprobs": False, "presence_penalty": 0.0, "frequency_penalty": 0, "tool_choice": "auto",
               "response_format": {"type": "text"}}  # fmt: skip
    check_request({**neutral, "model": "mine", "temperature": 2, "top_p": 1.0, "seed": 1, "stop": ["a", "b"]}, "mine")
    check_request(dict.fromkeys(neutral), "mine")
    assert stops_of({"stop": ""}) == stops_of({"stop": None}) == stops_of({}) == [] and stops_of({"stop": "a"}) == ["a"]


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        (["1, 2", ", 5", ", 6"], ["1, 2", ", ", ""]),
        (["a E", "N", "D b"], ["a ", "", ""]),
        (["a EN", "T"], ["a ", "ENT"]),
        (["EEN", "D"], ["E", ""]),
        (["a E"], ["a "]),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(pieces: list[str], told: list[str]) -> None:
    text = StopFilter(["5", "END"])
    assert [text.feed(piece) for piece in pieces] == told
    whole = "".join(pieces)
    rest = text.rest()
    assert text.has_ended or "".join(told) + rest == whole
    assert not text.has_ended or rest == ""


@pytest.mark.parametrize("said", [{"message": {"content": "1, 2, 5"}}, {"text": "1, 2, 5"}])
def test_a_whole_answer_ends_before_the_stop_string(said: dict[str, Any]) -> None:
    (choice,) = cut_answer({"choices": [{**said, "finish_reason": "length"}]}, ["5"])["choices"]
    assert (choice.get("message", {}).get("content") or choice.get("text")) == "1, 2, "
    assert choice["finish_reason"] == "stop"


def streamed(texts: list[str], is_chat: bool) -> list[dict[str, Any]]:
    """The events that are left of a stream of these texts, two events in a part."""

    def event(text: str | None, **rest: Any) -> str:
        said = {} if text is None else {"content": text} if is_chat else {"text": text}
        return f"data: {json.dumps({'choices': [{'index': 0, **({'delta': said} if is_chat else said), **rest}]})}\n\n"

    async def parts() -> AsyncIterator[str]:
        for first, second in zip(texts[::2], texts[1::2], strict=True):
            yield event(first) + event(second)
        yield event(None, finish_reason="length")

    async def left() -> list[str]:
        return [part async for part in cut_stream(parts(), ["5", "END"])]

    return [json.loads(part.removeprefix("data: ")) for part in asyncio.run(left())]


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize(
    ("texts", "whole", "reason"),
    [(["a\n\n", "b E", "N", "D c"], "a\n\nb ", "stop"), (["a", "b E"], "ab E", "length")],
)
def test_a_stream_ends_before_the_stop_string_and_loses_nothing_else(
    texts: list[str], whole: str, reason: str, is_chat: bool
) -> None:
    choices = [event["choices"][0] for event in streamed(texts, is_chat)]
    assert "".join((choice["delta"] if is_chat else choice).get("content" if is_chat else "text", "")
                   for choice in choices) == whole  # fmt: skip
    assert [choice.get("finish_reason") for choice in choices] == [None] * (len(choices) - 1) + [reason]
