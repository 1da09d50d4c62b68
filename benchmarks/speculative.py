"""Speculative against plain greedy decoding in float32, for each scheme: where they part, and what rejections cost.

python benchmarks/speculative.py --model_path MODEL --eval_file TEXT

In float32 a pass of several tokens rounds otherwise than passes of one, which tips codes over; so the two may part
where plain decoding's two likeliest tokens are nearly tied. Columns: the new token at which prompt lookup departs from
plain decoding, and the gap of the logits there; the largest difference of logits between the same text given one token
at a time and at once; KL(float || scheme) along plain decoding's text when it is decoded plainly, at once, and
speculatively, with 0 to 7 wrong tokens in each pass that are cropped.
"""

import argparse
import random
import sys
from collections.abc import Callable

import torch
from scoring import add_scoring_flags, load_float, read_windows
from transformers import PreTrainedModel

from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.compatibility import cache_argument
from octavo.common.runtime.schemes.kv_scheme import PRESETS, load_scheme
from octavo.common.stock_model import prepare

SEED = 0
MOST_RIGHT, MOST_WRONG = 5, 7
"""Tokens of a speculative pass that stay, at most, and that are cropped."""
Logits = torch.Tensor


def greedy(model: PreTrainedModel, ids: torch.Tensor, cache: QuantizedCache, new: int) -> tuple[torch.Tensor, Logits]:
    """Text `[1, S + new]` of plain decoding, and the logits `[new, vocabulary]` that chose its new tokens."""
    logits, step = [], ids
    for _ in range(new):
        logits.append(model(step, **{cache_argument(model): cache}).logits[0, -1])
        step = logits[-1].argmax()[None, None]
        ids = torch.cat((ids, step), dim=1)
    return ids, torch.stack(logits)


def speculative(model: PreTrainedModel, text: torch.Tensor, prompt: int, cache: QuantizedCache) -> Logits:
    """The logits of `greedy`, of a text that is known, in passes of several tokens of which some are cropped."""
    draw = random.Random(SEED)
    logits = [model(text[:, :prompt], **{cache_argument(model): cache}).logits[0, -1:]]
    while cache.get_seq_length() < text.shape[1] - 1:
        start = cache.get_seq_length()
        right = text[:, start : min(start + draw.randint(1, MOST_RIGHT), text.shape[1] - 1)]
        wrong = torch.tensor([[draw.randrange(model.config.vocab_size) for _ in range(draw.randint(0, MOST_WRONG))]])
        step = torch.cat((right, wrong.long()), dim=1)
        logits.append(model(step, **{cache_argument(model): cache}).logits[0, : right.shape[1]])
        cache.crop(-wrong.shape[1])
    return torch.cat(logits)


def divergence(wanted: Logits, found: Logits) -> float:
    """KL in nats per token."""
    wanted, found = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def row(model: PreTrainedModel, stock: PreTrainedModel, ids: torch.Tensor, new: int, scheme: str) -> tuple[str, ...]:
    """The figures of one scheme."""

    def cache() -> QuantizedCache:
        return QuantizedCache(model.config, scheme)

    prompt = ids.shape[1]
    text, plain = greedy(model, ids, cache(), new)
    reference = stock(text[:, :-1]).logits[0, prompt - 1 :]
    at_once = model(text[:, :-1], **{cache_argument(model): cache()}).logits[0, prompt - 1 :]
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "prompt_lookup_num_tokens": MOST_WRONG}
    looked_up = model.generate(ids, **{cache_argument(model): cache()}, **settings)
    differs = (looked_up != text)[0].nonzero()
    where, gap = "never", ""
    if len(differs):
        index = int(differs[0]) - prompt
        best = plain[index].topk(2).values
        where, gap = str(index), f"{float(best[0] - best[1]):.4f}"
    figures = [divergence(reference, found) for found in (plain, at_once, speculative(model, text, prompt, cache()))]
    return (scheme, where, gap, f"{float((at_once - plain).abs().max()):.3f}", *(f"{kl:.6f}" for kl in figures))


@torch.inference_mode()
def measure(flags: argparse.Namespace, show: Callable[[str], None]) -> None:
    """A line for each scheme."""
    torch.manual_seed(SEED)
    stock, tokenizer = load_float(flags.model_path)
    model = prepare(load_float(flags.model_path)[0])
    ids = read_windows(flags, tokenizer)[0]
    show("scheme, departs at, gap there, rounding of chunks, KL plain, KL at once, KL speculative")
    for scheme in flags.schemes:
        show(", ".join(row(model, stock, ids, flags.new_tokens, scheme)))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_scoring_flags(parser)
    parser.set_defaults(windows=1, length=300)
    parser.add_argument("--new_tokens", type=int, default=200)
    dynamic = [name for name in PRESETS if not load_scheme(name).is_static]
    parser.add_argument("--schemes", nargs="*", default=dynamic, help="presets without static scales")
    measure(parser.parse_args(), lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
