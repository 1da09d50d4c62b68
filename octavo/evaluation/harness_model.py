"""A model with a quantized cache as lm-eval knows models: every pass reads what the cache stores.

Imported where lm-eval is installed, and nowhere else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..common.errors import OctavoError
from ..common.runtime.compatibility import cache_argument
from ..common.runtime.schemes.kv_scheme import CROP_ROOM
from ..generate import Speaker
from .reading import Reader, longest_of

SEED = 0
"""Of the random numbers of each text that is sampled, the same for all models."""


class HarnessModel(TemplateLM):
    """Batch 1; a context is read once for all its continuations, which are taken off the cache again."""

    def __init__(self, speaker: Speaker, name: str) -> None:
        super().__init__()
        self.tokenizer, self._speaker, self._name = speaker.tokenizer, speaker, name
        self._longest = longest_of(speaker.model) or 2048

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, without a second token that begins it."""
        flags = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            flags["add_special_tokens"] = False
        return self.tokenizer.encode(string, **flags)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Of continuations `[C]` of contexts `[S]`: the log-probability, and whether greedy decoding writes them."""
        found, reader, read = [], None, None
        for _texts, context, continuation in tqdm(requests, desc=self._name, unit="request", leave=False):
            self._check_answer(len(continuation), self._longest)
            whole = (context + continuation)[-self._longest - 1 :]
            kept = whole[: max(0, len(whole) - len(continuation) - 1)]
            if reader is None or kept != read or not kept:
                reader, read = Reader(self._speaker), kept
                if kept:
                    reader.read(self._ids(kept))
            logits = torch.cat(list(reader.logits(self._ids(whole[len(kept) : -1]))))[-len(continuation) :]
            if len(continuation) <= CROP_ROOM and kept:
                reader.forget(len(kept))
            else:
                reader = None
            scores, targets = logits.float().log_softmax(-1), self._ids(whole[-len(continuation) :])
            total = float(scores.gather(1, targets[:, None]).sum())
            found.append((total, torch.equal(scores.argmax(-1), targets)))
        return found

    def _check_answer(self, tokens: int, room: int) -> None:
        """Raise an `OctavoError` if an answer of so many tokens is longer than its room."""
        if tokens > room:
            raise OctavoError(
                f"--tasks: one asks for an answer of {tokens:,} tokens, and the model is made for {self._longest:,} in "
                "all; leave that task out, or give it a smaller max_gen_toks"
            )

    def _ids(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor(ids, device=self._speaker.model.device)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows as long as the model."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self._longest, context_len=1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts behind contexts, up to what a task stops at; sampled ones with the same random numbers each time."""
        return [self._written(*request.args) for request in tqdm(requests, desc=self._name, unit="text", leave=False)]

    @torch.inference_mode()
    def _written(self, context: str, wanted: dict[str, Any]) -> str:
        model = self._speaker.model
        settings = normalize_gen_kwargs(wanted, 256)
        tokens = settings.pop("max_gen_toks")
        self._check_answer(tokens, self._longest - 1)  # behind one token of the context at least
        stops = handle_stop_sequences(settings.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
        if not settings["do_sample"]:
            settings.pop("temperature", None)
        ids = self._ids(self.tok_encode(context)[tokens - self._longest :])[None]
        with torch.random.fork_rng(enabled=settings["do_sample"]):
            if settings["do_sample"]:
                torch.manual_seed(SEED)
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **{cache_argument(model): self._speaker.new_cache()},
                max_new_tokens=tokens,
                stop_strings=[stop for stop in stops if stop],
                tokenizer=self.tokenizer,
                pad_token_id=self.eot_token_id,
                **settings,
            )
        text = self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        return postprocess_generated_text(text, stops, None)
