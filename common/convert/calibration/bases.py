"""Calibration of what K and V are stored in: the mean of K before RoPE, and bases of each KV head.

K before RoPE has a large mean in most heads; what is left of it lies in few directions, and queries ask for few. With
codes of one width, errors of all channels of what is stored are alike, and the errors of scores are least in a basis
that spreads both evenly.

To first order, errors e_j of the keys change the output of a query by `s sum_j p_tj (q_t . e_j) (v_j - o_t)`, with p
the weights of attention, o the output and s the scaling. So queries count by `sum_j p_tj^2 |v_j - o_t|^2`, which gives
the metric A = E[q q'], and keys by what queries give them, which gives B = E[x x'] of K less its mean. Of all bases T,
in which x is stored as T x with errors in proportion to the mean of its squares, `sum_c (T^-T A T^-1)_cc` times that
mean is least where both are the same and even: with A^1/2 B A^1/2 = U L U' and the Hadamard matrix H, in
`T = H L^-1/4 U' A^1/2` ("balanced"). By Cauchy and Schwarz, no T has less than `(sum_c L_c^1/2)^2 / D`.

Slow rotary pairs hardly turn within a calibration text, and do in a long context. Attention stays the same where all
tokens of a text move alike, so A and B are means over the texts as they stand and moved along the positions.

"oscar": `x U H`, U the eigenvectors of the covariance of queries (K), and of values by their weights in attention (V)
(OSCAR, arXiv 2605.17757; its permutation of channels is left out, since a scale serves all of a head).

Sinks, and pairs of a query and one of the newest keys, are left out: no scheme with bases codes these.

G KV heads, H query heads, S tokens, D head_dim, R channels that RoPE turns.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ....ops.shared.registry import NAMESPACE
from ...architecture import stated_or_known
from ...errors import OctavoError
from ...runtime.decoder import attention_modules
from ...runtime.rotary import hadamard, rotated_by_slot, slot_table, turned
from ...runtime.static_scales import Statistics
from .observe import attention_replaced, left_out_biases

WEIGHING = f"{NAMESPACE}_weigh"
SINKS, NEWEST = 4, 8
"""Tokens at the start of a text, and newest ones of a query, that count for nothing."""
TEXT_LENGTH = 1024
"""Tokens of each text that bases come from; docs/tried.md has what longer ones gain."""
POSITIONS = 8192
"""Texts are moved to every `TEXT_LENGTH`th position below this, and below those that a model is made for."""
MOST_TEXTS = 4
SHORTEST = 64
SMALLEST_PART = 1e-3
"""What is added to the diagonal of A and of B, by its mean: directions that no text has shown may come."""


def joined(
    samples: Iterable[dict[str, torch.Tensor]], length: int = TEXT_LENGTH, what: str = "bases of K and V"
) -> list[torch.Tensor]:
    """Token ids `[1, S]` of samples one behind the other, cut into texts of `length`, the first `MOST_TEXTS`.

    Raises:
        OctavoError: they are too short together.
    """
    ids = torch.cat([sample["input_ids"][0] for sample in samples])[: length * MOST_TEXTS]
    texts = [text[None] for text in ids.split(length)]
    if len(texts) > 1 and texts[-1].shape[1] < length:
        texts.pop()
    if not texts or texts[0].shape[1] < SHORTEST:
        raise OctavoError(f"{what} need calibration texts of at least {SHORTEST} tokens; give longer ones")
    return texts


def _balanced(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """M `[G, D, D]`, float64, of which x M is stored, from A and B `[G, D, D]`; M = T' of the module's T.

    In the unit in which the mean of the squares of x M is 1 where B is that of x x', as scales in a byte want it.
    """

    def steady(moments: torch.Tensor) -> torch.Tensor:
        mean = moments.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None].clamp_min(torch.finfo(torch.float32).tiny)
        return moments / mean + SMALLEST_PART * torch.eye(moments.shape[1], dtype=moments.dtype)

    size, directions = torch.linalg.eigh(steady(queries))
    root = (directions * size.sqrt()[:, None]) @ directions.transpose(1, 2)
    size, directions = torch.linalg.eigh(root @ steady(keys) @ root)
    basis = hadamard(root @ directions * size.clamp_min(size[:, -1:] * 1e-12)[:, None] ** -0.25)
    squares = (basis.transpose(1, 2) @ keys @ basis).diagonal(dim1=1, dim2=2).mean(dim=1)
    return basis / torch.where(squares > 0, squares, 1.0).sqrt()[:, None, None]


def squared_shares(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, mask: torch.Tensor | None
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Of each head of `[H or G, S, D]` states: its number, that of its KV head, p^2 `[S, S]` and o `[S, D]`.

    p^2 is 0 of keys that no scheme codes.

    Args:
        mask: `[1, 1, S, S]`, True where a query sees a key, or None.
    """
    heads, tokens, _ = query.shape
    coded = torch.ones(tokens, tokens, dtype=torch.bool, device=key.device).tril(-NEWEST)
    coded[:, :SINKS] = False
    hidden = torch.ones_like(coded).triu(1) if mask is None else ~mask[0, 0]
    for head in range(heads):
        group = head * key.shape[0] // heads
        scores = (query[head] @ key[group].T * scaling).masked_fill_(hidden, -torch.inf)
        share = torch.softmax(scores, dim=-1)
        output = share @ value[group]
        yield head, group, share.square_() * coded, output


class _Moments:
    """Second moments of q, K and V of one attention, weighted, and first ones of K.

    Args:
        key_bias: what folding leaves out of K, `[G, 1, D]`, or None.
        frequencies, factor: as in `AttentionObserver`.
        positions: texts are moved to those below it.
    """

    def __init__(self, key_bias: torch.Tensor | None, frequencies: torch.Tensor, factor: float, positions: int) -> None:
        self._bias = None if key_bias is None else (key_bias * factor)[:, 0].double().cpu()
        self._frequencies, self._positions = frequencies, positions
        self._sums: dict[str, torch.Tensor] = {}

    def _add(self, name: str, value: torch.Tensor) -> None:
        value = value.double().cpu()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, mask: torch.Tensor | None
    ) -> None:
        """See `[1, H or G, S, D]` states after RoPE of a text; the mask is True where a query sees a key, or None."""
        query, key, value = (part[0].float() for part in (query, key, value))
        groups, tokens, width = key.shape
        reads = query.shape[0] // groups
        by_query, by_key = self._weights(query, key, value, scaling, mask)
        self._add("count", torch.tensor(float(tokens - SINKS)))
        before = rotated_by_slot(key[None], self._frequencies, 0, backwards=True)[0]
        self._add("mean", before[:, SINKS:].sum(dim=1))
        q = query.reshape(groups, reads * tokens, width)
        self._add("q", (q * by_query.reshape(groups, -1, 1)).transpose(1, 2) @ q)
        self._add("all q", q.transpose(1, 2) @ q)
        self._add("v", (value * by_key[1][..., None]).transpose(1, 2) @ value)
        turns = slot_table(tuple(self._frequencies.tolist())).rows(tokens, key.device)[:tokens]
        still = turns.new_ones(tokens, width - turns.shape[1])
        turns = torch.cat((turns, still), dim=-1).expand(groups, -1, -1)  # [G, S, D]: cos, sin, and 1
        weighted = key * by_key[0][..., None]
        self._add("weight", by_key[0].sum(dim=1))
        self._add("k", weighted.transpose(1, 2) @ key)
        self._add("turned k", turns.transpose(1, 2) @ weighted)
        self._add("turned", (turns * by_key[0][..., None]).transpose(1, 2) @ turns)

    @staticmethod
    def _weights(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries count for, `[H, S]`, and keys and values, `[2, G, S]`."""
        heads, tokens, _ = query.shape
        by_query, by_key = query.new_zeros(heads, tokens), query.new_zeros(2, key.shape[0], tokens)
        for head, group, share, output in squared_shares(query, key, value, scaling, mask):
            distance = torch.cdist(output, value[group]).square_()
            by_key[1, group] += share.sum(dim=0)
            share *= distance
            by_query[head] = share.sum(dim=1)
            by_key[0, group] += (share * query[head].square().sum(dim=1, keepdim=True)).sum(dim=0)
        return by_query, by_key

    def _spread(self, mean: torch.Tensor) -> torch.Tensor:
        """B: the weighted second moments of `k - R_n mean`, `[G, D, D]`.

        R_n mean is P (cos, sin, 1) with a P that follows from the mean, so that sums over tokens are enough.
        """
        half = len(self._frequencies)
        first, second, rest = mean[:, :half], mean[:, half : 2 * half], mean[:, 2 * half :]
        places = torch.zeros(*mean.shape, mean.shape[1], dtype=mean.dtype)
        index = torch.arange(half)
        places[:, index, index], places[:, index, half + index] = first, -second
        places[:, half + index, index], places[:, half + index, half + index] = second, first
        others = torch.arange(2 * half, mean.shape[1])
        places[:, others, others] = rest
        cross = places @ self._sums["turned k"]
        return self._sums["k"] - cross - cross.transpose(1, 2) + places @ self._sums["turned"] @ places.transpose(1, 2)

    def _moved(self, moments: torch.Tensor) -> torch.Tensor:
        """The mean of `R_n moments R_n'`, `[G, D, D]`, over n of 0, TEXT_LENGTH, and so on."""
        angles = torch.arange(0, self._positions, TEXT_LENGTH)[:, None] * self._frequencies.double().cpu()
        rows = torch.cat((angles.cos(), angles.sin()), dim=-1)[:, None, None]
        return turned(turned(moments, rows).transpose(2, 3), rows).mean(dim=0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was found, by the names of `static_scales.py` within a layer."""
        mean = self._sums["mean"] / self._sums["count"]
        weight = self._sums["weight"].clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
        queries, keys = self._moved(self._sums["q"]), self._moved(self._spread(mean) / weight)
        found = {"k.mean": mean, "k.balanced": _balanced(queries, keys)}
        if self._bias is not None:
            found["k.folded.mean"] = mean - self._bias
        for name, moments in (("k.oscar", self._sums["all q"]), ("v.oscar", self._sums["v"])):
            found[name] = hadamard(torch.linalg.eigh(moments).eigenvectors)
        return {name: tensor.float() for name, tensor in found.items()}


def _weighing_attention(
    module: nn.Module, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **kwargs: Any
) -> Any:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    module.moments(query, key, value, scaling, mask)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)


def find_bases(model: nn.Module, samples: Iterable[dict[str, torch.Tensor]], statistics: Statistics) -> Statistics:
    """Run a float model over samples, joined to longer texts, and add means and bases to its statistics.

    The model is left as it was.

    Args:
        model: a causal language model of an architecture of the zoo.
        samples: keyword arguments of the model, `[1, S]` ids and mask each.
        statistics: what `observe.calibrate` found.

    Raises:
        OctavoError: the samples are too short together.
    """
    longest = min(POSITIONS, getattr(model.config, "max_position_embeddings", POSITIONS))
    texts = joined(samples, min(TEXT_LENGTH, longest))
    stated_or_known(model)
    attentions = attention_modules(model)

    def make(attention: nn.Module, frequencies: torch.Tensor, factor: float) -> _Moments:
        return _Moments(left_out_biases(model, attention.layer_idx)[0], frequencies, factor, longest)

    was_training, tensors = model.training, dict(statistics.tensors)
    model.eval()
    try:
        with (
            torch.inference_mode(),
            attention_replaced(model, attentions, WEIGHING, _weighing_attention, "moments", make),
        ):
            for ids in tqdm(texts, desc="finding bases", unit="text"):
                model.base_model(input_ids=ids.to(model.device), use_cache=False)
            for _, attention in attentions:
                found = attention.moments.tensors()
                tensors |= {f"layers.{attention.layer_idx}.{name}": tensor for name, tensor in found.items()}
    finally:
        model.train(was_training)
    return Statistics(tensors, statistics.metadata)
