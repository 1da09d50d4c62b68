"""KL, perplexity and top-1 on windows of a text.

S tokens of a window, V size of the vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from tqdm import tqdm

from ..common.convert.measure.fidelity import Comparison, Fidelity, LogitsOf
from ..common.errors import OctavoError
from ..generate import Speaker
from .reading import CHUNK, Reader

Read = Callable[[torch.Tensor], Iterable[torch.Tensor]]
"""Ids `[S]` to the logits of all tokens, `[CHUNK, V]` at a time, fewer at the end."""
MOST_KEPT = 10**9
"""Bytes of logits that are kept rather than computed again."""


def in_chunks(speaker: Speaker) -> Read:
    """How a model reads a window chunk by chunk, each token from the cache as it is stored."""
    return lambda ids: Reader(speaker).logits(ids)


def whole(logits_of: LogitsOf) -> Read:
    """How a model reads a window in one pass."""

    @torch.inference_mode()
    def read(ids: torch.Tensor) -> Iterable[torch.Tensor]:
        return logits_of(ids[None])[0].split(CHUNK)

    return read


class Kept:
    """How a model reads what it has read before: by logits that are kept, in memory, as far as there is room.

    Args:
        read: how it reads else; of a model that stays as it is.
        most: bytes of the logits in all; a window that does not fit any more is read again every time.
    """

    def __init__(self, read: Read, most: float = MOST_KEPT) -> None:
        self._read, self._room = read, most
        self._found: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def __call__(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """As `Read`."""
        key = tuple(ids.tolist())
        if key in self._found:
            yield from self._found[key]
            return
        parts: list[torch.Tensor] | None = []
        for part in self._read(ids):
            size = len(ids) * part[0].nbytes
            if size > self._room:
                parts = None
            if parts is not None:
                parts.append(part.cpu())
            yield part
        if parts:
            self._found[key] = parts
            self._room -= size


def compare_on_text(
    reference: Speaker,
    others: Mapping[str, Speaker],
    samples: Sequence[torch.Tensor],
    last: int = 0,
    expected: Read | None = None,
) -> dict[str, Fidelity]:
    """How far models are from the float one, teacher-forced, each token read from the cache as it is stored.

    Args:
        samples: windows of token ids, `[S]` each.
        last: score the predictions of the last so many tokens of a window alone; 0 scores all.
        expected: how the float model reads, where that is kept; None: as the others.

    Raises:
        OctavoError: there is nothing to score.
    """
    reads = {name: in_chunks(speaker) for name, speaker in others.items()}
    return compare_reads(expected or in_chunks(reference), reads, samples, last)


def compare_reads(
    expected: Read, others: Mapping[str, Read], samples: Sequence[torch.Tensor], last: int = 0, what: str = "text"
) -> dict[str, Fidelity]:
    """The same, of anything that gives logits; all read side by side, so that no window of them is held.

    Args:
        what: is written at the progress bar.
    """
    scores = {name: Comparison() for name in others}
    for ids in tqdm(samples, desc=what, unit="window"):
        _compare_window(expected, others, ids, max(0, len(ids) - 1 - last) if last else 0, scores)
    try:
        return {name: score.fidelity() for name, score in scores.items()}
    except ValueError as error:
        raise OctavoError(f"text: {error}; give a longer one") from None


def _compare_window(
    expected: Read, others: Mapping[str, Read], ids: torch.Tensor, first: int, scores: Mapping[str, Comparison]
) -> None:
    """Add the predictions of a window from token `first` on to the scores."""
    names = list(others)
    reads = [read(ids) for read in (expected, *others.values())]
    progress = tqdm(zip(*reads, strict=True), total=-(-len(ids) // CHUNK), unit="chunk", leave=False)
    for index, (plain, *found) in enumerate(progress):
        start = index * CHUNK
        stop = min(start + len(plain), len(ids) - 1)  # behind the last token comes none
        rows = slice(max(0, first - start), stop - start)
        targets = ids[start + 1 : stop + 1][rows]
        if len(targets):
            for name, logits in zip(names, found, strict=True):
                scores[name].add(plain[rows], logits[rows], targets)
