"""Text or chat from a model with a quantized cache: what `octavo run`, `octavo chat` and every `models/*/run.py` do."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, TextStreamer

from .common.architecture import Architecture, check_model_type
from .common.command import OneLineParser, run_script
from .common.convert.source.checkpoint import check_device, load_tokenizer
from .common.errors import OctavoError, first_line
from .common.runtime.cache.quantized_cache import QuantizedCache
from .common.runtime.cache.sizes import kept_kv_bytes
from .common.runtime.checkpoint.files import read_json
from .common.runtime.checkpoint.loading import CONFIG_FILE
from .common.runtime.compatibility import cache_argument
from .common.runtime.schemes.kv_scheme import Scheme, load_scheme
from .common.stock_model import prepare
from .sampling import add_sampling_flags, check_sampling, sampling_of, set_seed


@dataclass(frozen=True)
class Speaker:
    """A model that generates text, and what else that takes.

    Attributes:
        model, tokenizer: as transformers knows them.
        scheme: of the KV cache.
        new_cache: makes an empty cache.
    """

    model: Any
    tokenizer: Any
    scheme: Scheme
    new_cache: Callable[[], QuantizedCache]


def add_system_flag(parser: argparse.ArgumentParser) -> None:
    """Let a parser take what a conversation begins with."""
    parser.add_argument("--system", metavar="TEXT", help="what a chat begins with: who the model is, and what it does")


def _parse(name: str, argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        description=f"Generate text, or chat, with a converted {name} checkpoint.", allow_abbrev=False
    )
    parser.add_argument("--model_path", required=True, help="directory that the conversion script wrote")
    parser.add_argument("--prompt", help="text to continue; with --chat, the first message")
    parser.add_argument(
        "--chat", action="store_true", help="talk, using the tokenizer's chat template; empty line ends"
    )
    add_system_flag(parser)
    add_sampling_flags(parser)
    flags = parser.parse_args(argv)
    if flags.prompt is None and not flags.chat:
        parser.error("give --prompt, or --chat to talk")
    if flags.system is not None and not flags.chat:
        parser.error("--system: needs --chat")
    return flags


def _check_architecture(architecture: Architecture, directory: Path) -> None:
    """Raise an `OctavoError` that names the right script if config.json is of another architecture."""
    config = directory / CONFIG_FILE
    who = f"models/{architecture.name}/run.py runs"
    check_model_type(config, read_json(config).get("model_type"), architecture, who, "use models/{}/run.py")


def check_directory(directory: Path) -> None:
    """Raise an `OctavoError` if a directory holds no config.json."""
    if not (directory / CONFIG_FILE).is_file():
        reason = f"holds no {CONFIG_FILE}, so it is no checkpoint" if directory.is_dir() else "no such directory"
        raise OctavoError(f"--model_path {directory}: {reason}; give what the conversion wrote")


def load_converted(architecture: Architecture, directory: Path, device: str) -> Speaker:
    """A converted directory, ready to speak.

    Raises:
        OctavoError: it is none of this architecture, or is damaged.
    """
    model = _loaded(architecture.model_class, directory, device)
    return Speaker(model, load_tokenizer(directory, {}, False), model.scheme, model.new_cache)


def load_stock(directory: Path, scheme: str, statistics: Path | None, device: str) -> Speaker:
    """A model that was not converted, ready to speak with a quantized cache.

    Args:
        scheme: name of a preset, or a JSON file.
        statistics: of a calibration of the model, for schemes that need one.

    Raises:
        OctavoError: it cannot be loaded, or bears no such cache.
    """
    _check_statistics(scheme, statistics)
    check_statistics_used([scheme], statistics)
    model = prepare(_loaded(AutoModelForCausalLM, directory, device))
    return _speaking(model, load_tokenizer(directory, {}, False), scheme, statistics)


def with_scheme(speaker: Speaker, scheme: str | Scheme, statistics: Path | None) -> Speaker:
    """The same stock model with another scheme; see `load_stock`."""
    _check_statistics(scheme, statistics)
    return _speaking(speaker.model, speaker.tokenizer, scheme, statistics)


def _check_statistics(scheme: str | Scheme, statistics: Path | None) -> None:
    if load_scheme(scheme).is_static and statistics is None:
        raise OctavoError(
            f"--scheme {scheme}: its scales come from calibration; give --statistics FILE, which --save_statistics of "
            f"a conversion writes, or convert the model"
        )


def check_statistics_used(schemes: Sequence[str], statistics: Path | None) -> None:
    """Raise an `OctavoError` if statistics are given and no scheme, by name or file, takes its scales from them."""
    if statistics is not None and not any(load_scheme(scheme).is_static for scheme in schemes):
        raise OctavoError(f"--statistics {statistics}: {', '.join(schemes)} needs no calibration; leave it out")


def _speaking(model: Any, tokenizer: Any, scheme: str | Scheme, statistics: Path | None) -> Speaker:
    found = load_scheme(scheme)

    def new_cache() -> QuantizedCache:
        return QuantizedCache(model.config, found, statistics=statistics if found.is_static else None)

    return Speaker(model, tokenizer, found, new_cache)


def _loaded(model_class: Any, directory: Path, device: str) -> Any:
    try:
        # code of others in a directory is neither run nor asked about
        model = model_class.from_pretrained(directory, trust_remote_code=False).eval()
    except (OSError, RuntimeError, StrictDataclassError) as error:
        raise OctavoError(f"--model_path {directory}: cannot be loaded ({first_line(error)})") from None
    # moving to where it is would unpack all weights, and so need room for them twice
    return model if model.device.type == device else model.to(device)


def what_it_took(speaker: Speaker, cache: Any, new_tokens: int, seconds: float) -> str:
    """Speed and cache size of one answer, as a line."""
    model, tokens = speaker.model, cache.get_seq_length()
    plain = kept_kv_bytes(model.config, load_scheme("float"), tokens, model.dtype.itemsize)
    return (
        f"{new_tokens} tokens, {new_tokens / seconds:.1f} tokens/s; KV cache of {tokens} tokens: "
        f"{cache.used_nbytes():,} bytes "
        f"({cache.nbytes():,} allocated); {str(model.dtype).removeprefix('torch.')} would take {plain:,}"
    )


def _generate(speaker: Speaker, ids: torch.Tensor, cache: Any, flags: argparse.Namespace, skips: bool) -> torch.Tensor:
    """Stream an answer to stdout, without the prompt if `skips`; returns all ids, `[1, S]`."""
    model, tokenizer = speaker.model, speaker.tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=skips, skip_special_tokens=True)
    started = time.perf_counter()
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{cache_argument(model): cache},
        max_new_tokens=flags.max_new_tokens,
        streamer=streamer,
        pad_token_id=tokenizer.eos_token_id,
        **sampling_of(flags),
    )
    seconds = time.perf_counter() - started
    print(what_it_took(speaker, cache, result.shape[1] - ids.shape[1], seconds), file=sys.stderr)
    return result


def chat(speaker: Speaker, flags: argparse.Namespace) -> None:
    """Read messages until an empty line or the end of input; the cache goes on from turn to turn.

    Raises:
        OctavoError: the tokenizer has no chat template, or it takes no system prompt.
    """
    model, tokenizer = speaker.model, speaker.tokenizer
    if tokenizer.chat_template is None:
        raise OctavoError(
            f"{flags.model_path}: its tokenizer has no chat template, so that nobody can chat with it; give a text to "
            "continue instead (octavo run)"
        )
    messages = _first_messages(tokenizer, flags.system)
    set_seed(flags)
    cache, message = speaker.new_cache(), flags.prompt or _ask()
    cached = torch.empty((1, 0), dtype=torch.long)
    while message:
        messages.append({"role": "user", "content": message})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"].to(model.device)
        keep(cache, common_length(cached, ids), lambda line: print(line, file=sys.stderr))
        result = _generate(speaker, ids, cache, flags, skips=True)
        cached = result[:, : cache.get_seq_length()]
        answer = tokenizer.decode(result[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        message = _ask()


def _first_messages(tokenizer: Any, system: str | None) -> list[dict[str, str]]:
    """What a conversation begins with before anybody has said anything.

    Raises:
        OctavoError: the chat template takes no system prompt.
    """
    if system is None:
        return []
    messages = [{"role": "system", "content": system}]
    try:
        said = tokenizer.apply_chat_template([*messages, {"role": "user", "content": "?"}], tokenize=False)
    except TemplateError as error:
        raise OctavoError(f"--system: the chat template takes none ({first_line(error)}); leave it out") from None
    if system.strip() not in said:
        raise OctavoError("--system: the chat template does not tell it to the model; leave it out")
    return messages


def go_on(speaker: Speaker, flags: argparse.Namespace) -> None:
    """Continue the text that the flags give.

    Raises:
        OctavoError: it holds no token.
    """
    ids = speaker.tokenizer(flags.prompt, return_tensors="pt")["input_ids"].long().to(speaker.model.device)
    if ids.shape[1] == 0:
        raise OctavoError("--prompt: holds no token; give some text")
    set_seed(flags)
    _generate(speaker, ids, speaker.new_cache(), flags, skips=False)


def common_length(cached: torch.Tensor, ids: torch.Tensor) -> int:
    """How many leading tokens of `ids` the cache holds already; at least the last token is computed anew."""
    length = min(cached.shape[1], ids.shape[1] - 1)
    differs = (cached[0, :length].to(ids.device) != ids[0, :length]).nonzero()
    return int(differs[0]) if len(differs) else length


def keep(cache: Any, length: int, say: Callable[[str], None]) -> None:
    """Leave the first `length` tokens; none where the cache cannot, so that all are computed anew, which is said."""
    try:
        cache.crop(length - cache.get_seq_length())
    except OctavoError as error:
        say(f"the conversation is computed anew: {error}")
        cache.reset()


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def run(architecture: Architecture, flags: argparse.Namespace) -> None:
    """Load a converted checkpoint and generate as the flags say.

    Raises:
        OctavoError: the directory is none, or is damaged.
    """
    check_sampling(flags)
    check_device(flags.device_type)
    directory = Path(flags.model_path)
    check_directory(directory)
    _check_architecture(architecture, directory)
    speaker = load_converted(architecture, directory, flags.device_type)
    (chat if flags.chat else go_on)(speaker, flags)


def main(architecture: Architecture, argv: list[str] | None = None) -> int:
    """Entry point of a run script; returns the exit code."""
    return run_script(lambda arguments: run(architecture, _parse(architecture.name, arguments)), argv)
