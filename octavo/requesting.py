"""Requests of OpenAI's API, as its clients mean them, before and behind the handlers of transformers' server.

What is not served is refused rather than left out in silence, a temperature above 0 samples, and a string that ends an
answer is no part of it.
"""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}
"""Fields that are refused, and the values of each that ask for nothing."""
_MOST = {"temperature": float("inf"), "top_p": 1}
_SEEDS = range(-(2**63), 2**64)
_TEXTS = ("content", "reasoning_content", "text")


class RequestRefused(Exception):
    """A request that is not answered, and the field because of which it is not."""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(f"{param}: {reason}")
        self.param = param


def error_form(message: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API tells it."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_request(body: dict[str, Any], model: str | None) -> None:
    """Raise a `RequestRefused` if a request asks for what is not served.

    Args:
        model: the only one that is served.
    """
    if model is not None and body.get("model") not in (None, model):
        raise RequestRefused("model", f"{body['model']!r} is not served here; {model!r} is")
    for field, neutral in NOT_SERVED.items():
        value = body.get(field)
        asks = all(value != each or isinstance(value, bool) != isinstance(each, bool) for each in neutral)
        if value is not None and asks:
            raise RequestRefused(field, f"{json.dumps(value)} is not served; leave it out")
    for field, most in _MOST.items():
        value = body.get(field)
        if value is not None and not (_is_number(value) and 0 <= value <= most):
            raise RequestRefused(field, f"{json.dumps(value)} is no number from 0 to {most}")
    seed = body.get("seed")
    if seed is not None and not (type(seed) is int and seed in _SEEDS):
        raise RequestRefused("seed", f"{json.dumps(seed)} is no integer of 64 bits")
    if not all(isinstance(each, str) for each in stops_of(body)):
        raise RequestRefused("stop", "is a string or a list of strings")


def stops_of(body: dict[str, Any]) -> list[Any]:
    """The strings that end the answer; empty ones, which end none, are left out."""
    stop = body.get("stop") or []
    return [each for each in (stop if isinstance(stop, list) else [stop]) if each != ""]


def set_sampling(config: Any, body: dict[str, Any]) -> None:
    """Let a `GenerationConfig`, in place, sample as a request says; where that says nothing it stays."""
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if temperature is not None:
        config.do_sample = temperature > 0
    elif top_p is not None and top_p < 1:
        config.do_sample = True
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None  # of sampling alone
    config.seed = body.get("seed")
    config.stop_strings = stops_of(body) or config.stop_strings or None


class StopFilter:
    """A text that comes in pieces, up to the first of some strings, which is left out."""

    def __init__(self, stops: list[str]) -> None:
        self._stops, self._held, self.has_ended = stops, "", False

    def feed(self, piece: str) -> str:
        """What can be told now: what may be the beginning of a string that ends the text is held back."""
        if self.has_ended:
            return ""
        text = self._held + piece
        ends = [place for place in map(text.find, self._stops) if place >= 0]
        if ends:
            self._held, self.has_ended = "", True
            return text[: min(ends)]
        most = max(map(len, self._stops)) - 1
        begins = range(max(0, len(text) - most), len(text))
        cut = next((at for at in begins if any(stop.startswith(text[at:]) for stop in self._stops)), len(text))
        self._held = text[cut:]
        return text[:cut]

    def rest(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _said(choice: dict[str, Any]) -> dict[str, Any]:
    """Where a choice holds its text: of a chat, of its stream, or of a completion."""
    return choice.get("message") or choice.get("delta") or choice


def cut_answer(answer: dict[str, Any], stops: list[str]) -> dict[str, Any]:
    """A whole answer, in place, up to what ends it."""
    for choice in answer.get("choices", ()):
        said = _said(choice)
        for field in _TEXTS:
            if isinstance(said.get(field), str):
                text = StopFilter(stops)
                said[field] = text.feed(said[field]) + text.rest()
                if text.has_ended and choice.get("finish_reason") == "length":
                    choice["finish_reason"] = "stop"
    return answer


def _cut_event(event: dict[str, Any], filters: dict[str, StopFilter]) -> list[dict[str, Any]]:
    """An event of a stream up to what ends the text; before the last, one of what was held back."""
    if not event.get("choices"):
        return [event]
    (choice,) = event["choices"]
    said = _said(choice)
    for field, text in filters.items():
        if isinstance(said.get(field), str):
            said[field] = text.feed(said[field])
    if choice.get("finish_reason") is None:
        return [event]
    if choice["finish_reason"] == "length" and any(text.has_ended for text in filters.values()):
        choice["finish_reason"] = "stop"
    rests = {field: rest for field, text in filters.items() if (rest := text.rest())}
    if not rests:
        return [event]
    late = {"index": 0, "delta": rests} if "delta" in choice else {"index": 0, **rests}
    return [{**{key: value for key, value in event.items() if key != "usage"}, "choices": [late]}, event]


async def cut_stream(parts: AsyncIterator[str], stops: list[str]) -> AsyncIterator[str]:
    """The events `data: {...}` of a stream, up to what ends the text."""
    filters = {field: StopFilter(stops) for field in _TEXTS}
    async with aclosing(parts):  # a client that goes ends the generation
        async for part in parts:
            for line in part.split("\n\n"):
                words = line.removeprefix("data: ")
                if words.startswith("{"):
                    for event in _cut_event(json.loads(words), filters):
                        yield f"data: {json.dumps(event)}\n\n"
                elif line:
                    yield f"{line}\n\n"


def as_openai_means(handler: type) -> type:
    """A handler of transformers' server that keeps to the API of OpenAI."""

    class Handler(handler):
        def _validate_request(self, body: dict[str, Any]) -> None:
            check_request(body, self.model_manager.force_model)
            super()._validate_request(body)

        def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            unseeded = {**body, "seed": None}  # what else is being answered draws from the same generator
            config = super()._build_generation_config(unseeded, *args, **kwargs)
            set_sampling(config, body)
            return config

        async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
            response = await super().handle_request(body, request_id)
            stops = stops_of(body)
            if not stops:
                return response
            if hasattr(response, "body_iterator"):
                response.body_iterator = cut_stream(response.body_iterator, stops)
                return response
            return type(response)(cut_answer(json.loads(response.body), stops))

    return Handler


def tell_errors(app: Any) -> Any:
    """Let an application of FastAPI tell errors of requests as OpenAI's API does; returns it."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    async def refused(_: Any, error: RequestRefused) -> JSONResponse:
        return JSONResponse(error_form(str(error), error.param), status_code=400)

    async def failed(_: Any, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_form(str(error.detail)), status_code=error.status_code)

    async def unread(_: Any, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(error_form(f"the body is no JSON object: {error.errors()[0]['msg']}"), status_code=400)

    for kind, tell in ((RequestRefused, refused), (HTTPException, failed), (RequestValidationError, unread)):
        app.add_exception_handler(kind, tell)
    return app
