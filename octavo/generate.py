"""The run script of every `models/*/run.py`: text or chat from a converted checkpoint."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import TextStreamer

from .common.architecture import Architecture, check_model_type
from .common.command import DEVICES, OneLineParser, run_script
from .common.convert.source.checkpoint import check_device, load_tokenizer
from .common.errors import OctavoError, first_line
from .common.runtime.cache.sizes import kept_kv_bytes
from .common.runtime.checkpoint.files import read_json
from .common.runtime.compatibility import cache_argument
from .common.runtime.schemes.kv_scheme import load_scheme


def _parse(name: str, argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        description=f"Generate text, or chat, with a converted {name} checkpoint.", allow_abbrev=False
    )
    parser.add_argument("--model_path", required=True, help="directory that the conversion script wrote")
    parser.add_argument("--prompt", help="text to continue; with --chat, the first message")
    parser.add_argument(
        "--chat", action="store_true", help="talk, using the tokenizer's chat template; empty line ends"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="most tokens per answer (default 128)")
    parser.add_argument("--do_sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--temperature", type=float, help="with --do_sample")
    parser.add_argument("--device_type", choices=DEVICES, default="cpu", help="where to run (default cpu)")
    flags = parser.parse_args(argv)
    if flags.prompt is None and not flags.chat:
        parser.error("give --prompt, or --chat to talk")
    if flags.max_new_tokens < 1:
        parser.error(f"--max_new_tokens {flags.max_new_tokens}: is no positive integer")
    if flags.temperature is not None and not flags.do_sample:
        parser.error("--temperature: needs --do_sample")
    if flags.temperature is not None and not flags.temperature > 0:
        parser.error(
            f"--temperature {flags.temperature}: is not positive; leave --do_sample out for the likeliest token"
        )
    return flags


def _check_architecture(architecture: Architecture, directory: Path) -> None:
    """Raise an `OctavoError` that names the right script if config.json is of another architecture."""
    config = directory / "config.json"
    who = f"models/{architecture.name}/run.py runs"
    check_model_type(config, read_json(config).get("model_type"), architecture, who, "use models/{}/run.py")


def _load(architecture: Architecture, flags: argparse.Namespace) -> tuple[Any, Any]:
    check_device(flags.device_type)
    directory = Path(flags.model_path)
    if not (directory / "config.json").is_file():
        reason = "holds no config.json, so it is no checkpoint" if directory.is_dir() else "no such directory"
        raise OctavoError(f"--model_path {directory}: {reason}; give what the conversion wrote")
    _check_architecture(architecture, directory)
    try:
        # code of others in a directory is neither run nor asked about
        model = architecture.model_class.from_pretrained(directory, trust_remote_code=False)
    except (OSError, RuntimeError, StrictDataclassError) as error:
        raise OctavoError(f"--model_path {directory}: cannot be loaded ({first_line(error)})") from None
    return model.to(flags.device_type).eval(), load_tokenizer(directory, {}, False)


def _report(model: Any, cache: Any, new_tokens: int, seconds: float) -> None:
    """Speed and cache size of one answer, on stderr."""
    tokens = cache.get_seq_length()
    used = model.kept_kv_bytes(tokens)
    plain = kept_kv_bytes(model.config, load_scheme("float"), tokens, model.dtype.itemsize)
    print(
        f"{new_tokens} tokens, {new_tokens / seconds:.1f} tokens/s; KV cache of {tokens} tokens: {used:,} bytes "
        f"({cache.nbytes():,} allocated), {plain:,} in {str(model.dtype).removeprefix('torch.')}",
        file=sys.stderr,
    )


def _generate(model: Any, tokenizer: Any, ids: torch.Tensor, cache: Any, flags: argparse.Namespace) -> torch.Tensor:
    """Stream an answer to stdout; returns all ids, `[1, S]`."""
    streamer = TextStreamer(tokenizer, skip_prompt=flags.chat, skip_special_tokens=True)
    sampling = {"temperature": flags.temperature} if flags.temperature is not None else {}
    started = time.perf_counter()
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{cache_argument(model): cache},
        max_new_tokens=flags.max_new_tokens,
        do_sample=flags.do_sample,
        streamer=streamer,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    _report(model, cache, result.shape[1] - ids.shape[1], time.perf_counter() - started)
    return result


def _chat(model: Any, tokenizer: Any, flags: argparse.Namespace) -> None:
    """Read messages until an empty line or the end of input; the cache goes on from turn to turn."""
    if tokenizer.chat_template is None:
        raise OctavoError(f"--chat: the tokenizer of {flags.model_path} has no chat template; use --prompt")
    messages: list[dict[str, str]] = []
    cache, message = model.new_cache(), flags.prompt or _ask()
    cached = torch.empty((1, 0), dtype=torch.long)
    while message:
        messages.append({"role": "user", "content": message})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"].to(model.device)
        _keep(cache, _common_length(cached, ids))
        result = _generate(model, tokenizer, ids, cache, flags)
        cached = result[:, : cache.get_seq_length()]
        answer = tokenizer.decode(result[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        message = _ask()


def _common_length(cached: torch.Tensor, ids: torch.Tensor) -> int:
    """How many leading tokens of `ids` the cache holds already; at least the last token is computed anew."""
    length = min(cached.shape[1], ids.shape[1] - 1)
    differs = (cached[0, :length].to(ids.device) != ids[0, :length]).nonzero()
    return int(differs[0]) if len(differs) else length


def _keep(cache: Any, length: int) -> None:
    """Leave the first `length` tokens; none where the cache cannot, so that all are computed anew, which is said."""
    try:
        cache.crop(length - cache.get_seq_length())
    except OctavoError as error:
        print(f"the conversation is computed anew: {error}", file=sys.stderr)
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
    model, tokenizer = _load(architecture, flags)
    if flags.chat:
        _chat(model, tokenizer, flags)
        return
    ids = tokenizer(flags.prompt, return_tensors="pt")["input_ids"].long().to(model.device)
    if ids.shape[1] == 0:
        raise OctavoError("--prompt: holds no token; give some text")
    _generate(model, tokenizer, ids, model.new_cache(), flags)


def main(architecture: Architecture, argv: list[str] | None = None) -> int:
    """Entry point of a run script; returns the exit code."""
    return run_script(lambda arguments: run(architecture, _parse(architecture.name, arguments)), argv)
