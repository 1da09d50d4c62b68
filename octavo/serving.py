"""An OpenAI-style endpoint over a model with a quantized KV cache: transformers' own server, which is handed the model.

`transformers serve` loads the class that config.json names in `architectures` and takes no notice of `auto_map`. Here
its manager of models hands out a model that is loaded already. Each request goes on from the cache of the one before as
far as both begin with the same tokens, so that a conversation is not read anew at every turn.
"""

import importlib
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from .common.errors import OctavoError
from .common.runtime.compatibility import cache_argument
from .generate import Speaker, common_length, keep, what_it_took
from .requesting import as_openai_means, tell_errors

_SERVER = "transformers.cli.serve"
_PARTS = "transformers.cli.serving"
_HANDLERS = {
    "chat_completion": "ChatCompletionHandler",
    "completion": "CompletionHandler",
    "response": "ResponseHandler",
}


class Answers:
    """`generate` of a model that answers one request after another, each from the cache of the one before.

    Args:
        speaker: the model.
        say: is told a line of each request.
    """

    def __init__(self, speaker: Speaker, say: Callable[[str], None] = print) -> None:
        self._speaker, self._say = speaker, say
        self._generate, self._cache_name = speaker.model.generate, cache_argument(speaker.model)
        self._forget()

    def _forget(self) -> None:
        self._cache, self._cached = None, torch.empty((1, 0), dtype=torch.long)

    def _cache_for(self, ids: torch.Tensor) -> Any:
        """A cache that holds the first tokens of `ids` `[1, S]`, all but the last at most, or none of them."""
        cache, common = self._cache, common_length(self._cached, ids)
        if cache is None or common == 0:
            return self._speaker.new_cache()
        keep(cache, common, self._say)
        return cache

    @torch.inference_mode()
    def __call__(self, **arguments: Any) -> torch.Tensor:
        """As `generate` of transformers, with `input_ids` `[B, S]`; returns all ids."""
        ids, config = arguments["input_ids"], arguments.get("generation_config")
        is_plain = len(ids) == 1 and all(
            getattr(config, field, None) in (None, 1) for field in ("num_beams", "num_return_sequences")
        )
        seed = getattr(config, "seed", None) if getattr(config, "do_sample", False) else None
        if seed is not None:
            torch.manual_seed(seed)
        # who gives a seed wants the same text again, so that it does not depend on the request before
        cache = self._cache_for(ids) if is_plain and seed is None else self._speaker.new_cache()
        kept, started = cache.get_seq_length(), time.perf_counter()
        self._forget()  # a request that is cancelled leaves a cache of which nobody knows what it holds
        found = self._generate(**arguments, **{self._cache_name: cache})
        seconds, made = time.perf_counter() - started, found.shape[1] - ids.shape[1]
        if is_plain:
            self._cache, self._cached = cache, found[:, : cache.get_seq_length()]
        read = f"{ids.shape[1] - kept} tokens read, {kept} kept from the request before"
        self._say(f"{read}; {what_it_took(self._speaker, cache, made, seconds)}")
        return found


@contextmanager
def _handing_out(speaker: Speaker) -> Iterator[None]:
    """Let transformers' server, which is made meanwhile, hand out this model, and answer as OpenAI's API does."""
    managers, servers = (importlib.import_module(f"{_PARTS}.{name}") for name in ("model_manager", "server"))

    class Manager(managers.ModelManager):
        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return speaker.tokenizer

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return speaker.model

    build = servers.build_server
    changes = [
        (managers, "ModelManager", Manager),
        (servers, "build_server", lambda *args, **kwargs: tell_errors(build(*args, **kwargs))),
    ]
    for part, name in _HANDLERS.items():
        module = importlib.import_module(f"{_PARTS}.{part}")
        changes.append((module, name, as_openai_means(getattr(module, name))))
    with ExitStack() as stack:
        for module, name, made in changes:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, made)
        yield


def check_server() -> None:
    """Raise an `OctavoError` unless what transformers' server needs is installed."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise OctavoError("octavo serve is transformers' server, which needs more: pip install 'transformers[serving]'")


def check_port(host: str, port: int) -> None:
    """Raise an `OctavoError` if nobody can listen there."""
    if not 0 < port < 2**16:  # the system would take another in its place
        raise OctavoError(f"--port {port}: is no port; give one from 1 to {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise OctavoError(f"--host {host} --port {port}: cannot listen there ({error.strerror}); give others") from None


def serve(speaker: Speaker, name: str, host: str, port: int, say: Callable[[str], None] = print) -> None:
    """Answer requests until somebody ends it, as Ctrl-C does.

    Args:
        name: what clients call the model.
        say: is told a line of each request.

    Raises:
        OctavoError: nothing can be served, and why.
    """
    check_server()
    check_port(host, port)
    speaker.model.generate = Answers(speaker, say)
    with _handing_out(speaker), suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
        importlib.import_module(_SERVER).Serve(force_model=name, host=host, port=port)
