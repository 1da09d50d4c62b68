"""KL, perplexity and top-1 on windows of a text, each token read from the cache as it is stored."""

from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from ..common.convert.measure.fidelity import Comparison, Fidelity
from ..common.errors import OctavoError
from ..generate import Speaker
from .reading import CHUNK, Reader


def compare_on_text(
    reference: Speaker, others: Mapping[str, Speaker], samples: Sequence[torch.Tensor], last: int = 0
) -> dict[str, Fidelity]:
    """How far models are from the float one, teacher-forced; all read side by side, so that no window is kept.

    Args:
        samples: windows of token ids, `[S]` each.
        last: score the predictions of the last so many tokens of a window alone; 0 scores all.

    Raises:
        OctavoError: there is nothing to score.
    """
    scores = {name: Comparison() for name in others}
    for ids in tqdm(samples, desc="text", unit="window"):
        _compare_window(reference, others, ids, max(0, len(ids) - 1 - last) if last else 0, scores)
    try:
        return {name: score.fidelity() for name, score in scores.items()}
    except ValueError as error:
        raise OctavoError(f"text: {error}; give a longer one") from None


def _compare_window(
    reference: Speaker, others: Mapping[str, Speaker], ids: torch.Tensor, first: int, scores: Mapping[str, Comparison]
) -> None:
    """Add the predictions of a window from token `first` on to the scores."""
    names = list(others)
    reads = [Reader(speaker).logits(ids) for speaker in (reference, *others.values())]
    progress = tqdm(zip(*reads, strict=True), total=-(-len(ids) // CHUNK), unit="chunk", leave=False)
    for index, (expected, *found) in enumerate(progress):
        start = index * CHUNK
        stop = min(start + len(expected), len(ids) - 1)  # behind the last token comes none
        rows = slice(max(0, first - start), stop - start)
        targets = ids[start + 1 : stop + 1][rows]
        if len(targets):
            for name, logits in zip(names, found, strict=True):
                scores[name].add(expected[rows], logits[rows], targets)
