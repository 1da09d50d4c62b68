"""Calibration of which layers need their keys exactly: those whose attention is sharp, where a text repeats itself.

A model copies from far back by few heads: some find the token before each, others where the newest one stood earlier
(induction heads: Olsson et al., arXiv 2209.11895). Their softmax lies on one key among thousands, which coarse codes
blur, and on prose that does not repeat itself they do next to nothing.

To first order, errors e_j of the keys change the log-likelihood by `s sum_j p_tj (q_t . e_j) (g_t . (v_j - o_t))`, with
g_t the gradient by the output o_t of a head. Tokens are drawn from the predictions themselves, so that half the square
of that is the KL of the predictions (Fisher information). Only predictions within the second half of the text count,
which repeats the first. Queries count by `sum_j (s p_tj g_t . (v_j - o_t))^2`, which gives the metric A = E[q q']; with
B the covariance of the keys, a layer costs in proportion to `(sum_c L_c^1/2)^2 / D`, L the eigenvalues of
A^1/2 B A^1/2: the least that codes of one width cost in any basis (`bases.py`), the sum over its KV heads.

G KV heads, H query heads, S tokens, D head_dim.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ....ops.shared.registry import NAMESPACE
from ...architecture import stated_or_known
from ...errors import OctavoError
from ...runtime.decoder import attention_modules, capped_logits, decoder_layers, stated_decoder
from ...runtime.rotary import rotated_by_slot
from ...runtime.static_scales import Statistics
from .bases import SINKS, joined, squared_shares
from .observe import attention_replaced, differentiable

FOLLOWING = f"{NAMESPACE}_follow"
REPEATING_LENGTH = 1536
"""Tokens of the text that repeats itself; docs/tried.md has which layers others find."""
PASSAGE = 128
"""Tokens that are repeated in one piece."""
ROWS = 256
"""Tokens whose predictions are in memory together."""


def repeating_itself(ids: torch.Tensor) -> torch.Tensor:
    """Token ids `[1, S]` whose second half is passages of the first, in another order."""
    half = ids.shape[1] // 2
    size = max(1, min(PASSAGE, half // 4))
    passages = ids[0, :half].split(size)
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.cat((ids[0, :half], *(passages[index] for index in order)))[None, : ids.shape[1]]


class _Follower:
    """A and B of one attention, float64 `[G, D, D]`.

    Args:
        frequencies: as in `AttentionObserver`.
        seen: called once it has seen the text.
    """

    def __init__(self, frequencies: torch.Tensor, seen: Callable[[], Any]) -> None:
        self._frequencies, self._seen = frequencies, seen
        self._metric = self._covariance = torch.empty(0)

    def _covariance_of(self, key: torch.Tensor) -> torch.Tensor:
        """B of `[G, S, D]`: of K less its mean before RoPE, turned to each slot."""
        before = rotated_by_slot(key[None], self._frequencies, 0, backwards=True)
        before = before - before[:, :, SINKS:].mean(dim=2, keepdim=True)
        rest = rotated_by_slot(before, self._frequencies, 0)[0, :, SINKS:].double()
        return rest.transpose(1, 2) @ rest / rest.shape[1]

    def __call__(
        self,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scaling: float,
        mask: torch.Tensor | None,
        gradient: torch.Tensor,
    ) -> None:
        """See q, K and V, `[1, H or G, S, D]`, and the gradient by the output, `[1, S, H, D]`."""
        query, key, value = (part[0].float() for part in states)
        gradient, groups = gradient[0].transpose(0, 1).float(), key.shape[0]
        by_query = query.new_zeros(query.shape[:2])
        for head, group, share, output in squared_shares(query, key, value, scaling, mask):
            own = (gradient[head] * output).sum(dim=-1, keepdim=True)
            noticed = (gradient[head] @ value[group].T - own) * scaling
            by_query[head] = (share * noticed.square_()).sum(dim=1)
        query = query.reshape(groups, -1, query.shape[-1]).double()
        weighted = query * by_query.reshape(groups, -1, 1)
        self._metric = (weighted.transpose(1, 2) @ query / key.shape[1]).cpu()
        self._covariance = self._covariance_of(key).cpu()
        self._seen()

    def sharpness(self) -> torch.Tensor:
        """`[1]`, float32."""
        size, directions = torch.linalg.eigh(self._metric)
        root = (directions * size.clamp_min(0).sqrt()[:, None]) @ directions.transpose(1, 2)
        shared = torch.linalg.eigvalsh(root @ self._covariance @ root).clamp_min(0)
        return (shared.sqrt().sum(dim=1).square().sum() / root.shape[-1])[None].float()


def _followed_attention(
    module: nn.Module, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **kwargs: Any
) -> Any:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output, weights = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    if not output.requires_grad:  # the first layer: no parameter before it has gradients
        output = output.detach().requires_grad_()
    states = query.detach(), key.detach(), value.detach()
    output.register_hook(functools.partial(module.follower, states, scaling, mask))
    return output, weights


@contextmanager
def _checkpointed(layers: list[nn.Module]) -> Iterator[None]:
    """Within it, what goes into a layer is kept for the way back, and nothing of what is within it."""
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before


def _differentiate_predictions(model: nn.Module, ids: torch.Tensor) -> None:
    """Differentiate the log-likelihood of tokens that are drawn from predictions of a model, behind `[1, S]` ids.

    Only predictions within the second half count; they attend to the whole text.

    Raises:
        OctavoError: the predictions are no numbers.
    """
    facts, config = stated_decoder(model), model.config.get_text_config(decoder=True)
    states = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    last = states.detach().requires_grad_()
    generator = torch.Generator(last.device).manual_seed(0)
    for rows in last[0, ids.shape[1] // 2 :].split(ROWS):
        logits = capped_logits(facts, config, model.get_output_embeddings()(rows).float())
        likely = torch.log_softmax(logits, dim=-1)
        if not likely.isfinite().all():
            raise OctavoError("sharp layers: the model overflows on the calibration text")
        drawn = torch.multinomial(likely.detach().exp(), 1, generator=generator)
        likely.gather(1, drawn).sum().backward()
    states.backward(last.grad)


def find_sharpness(model: nn.Module, samples: Iterable[dict[str, torch.Tensor]], statistics: Statistics) -> Statistics:
    """Run a float model over a text that repeats itself, forwards and backwards, and add how sharp its layers are.

    The model is left as it was. On top of a forward pass it needs memory for the activations of one layer and for q,
    K and V of all, and for the logits of 256 tokens.

    Args:
        model: a causal language model of an architecture of the zoo.
        samples: keyword arguments of the model, `[1, S]` ids and mask each, whose first tokens are the text.
        statistics: what `observe.calibrate` found.

    Raises:
        OctavoError: the samples are too short together, or the model overflows on them.
    """
    longest = min(REPEATING_LENGTH, getattr(model.config, "max_position_embeddings", REPEATING_LENGTH))
    text = joined(samples, longest, "sharp layers")[0]
    stated_or_known(model)
    attentions, tensors = attention_modules(model), dict(statistics.tensors)

    layers = [layer for _, layer in decoder_layers(model)]
    progress = tqdm(total=len(attentions), desc="finding sharp layers", unit="layer")

    def make(attention: nn.Module, frequencies: torch.Tensor, factor: float) -> _Follower:
        return _Follower(frequencies, progress.update)

    with (
        progress,
        attention_replaced(model, attentions, FOLLOWING, _followed_attention, "follower", make),
        differentiable(model),
        _checkpointed(layers),
    ):
        _differentiate_predictions(model, repeating_itself(text))
        for _, attention in attentions:
            tensors[f"layers.{attention.layer_idx}.k.sharpness"] = attention.follower.sharpness()
    return Statistics(tensors, statistics.metadata)
