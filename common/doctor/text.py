"""What the doctor says, for a terminal."""

from collections.abc import Iterable
from typing import Any

from ..command import aligned
from ..runtime.bias_fold import STEADY_ROPE_TYPES
from ..runtime.schemes.linear_scheme import SMALLEST_GROUP
from .diagnosis import ATTENTIONS, BLOCK, BROKEN, KINDS, STRAINED, is_broken

MOST_EMBEDDING_ERROR = 0.01
"""Relative error of embeddings in int8 that is advised: with 0.005 the KL of SmolLM2-135M grows by less than 0.001."""


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers as text: "0-2, 8"; "none" if there are none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs) or "none"


def _worst(lost: dict[str, float]) -> float:
    return max(lost.values())


def _reason(layer: dict[str, Any]) -> str:
    """What is the matter with a layer."""
    causes = []
    if _worst(layer["lost_folded"]) < STRAINED or layer["bias_pair"] > layer["outlier"]:
        causes.append("bias of K")
    if _worst(layer["lost_folded"]) >= STRAINED:
        causes.append("outlier channel")
    broken = [kind for kind in KINDS if is_broken(kind, layer["lost"])]
    effect = f"breaks {', '.join(broken)}" if broken else "strains 4 bits: less than one bit is left"
    return f"{' and '.join(causes)}: {effect}"


def _layer_lines(report: dict[str, Any]) -> list[str]:
    """The table of layers that are in the way, and the others in a line."""
    bad = [layer for layer in report["layers"] if _worst(layer["lost"]) >= STRAINED]
    fine = [layer["layer"] for layer in report["layers"] if _worst(layer["lost"]) < STRAINED]
    kinds = [kind for kind in KINDS if kind != "channel"]
    rows = [["layer", "|k bias|", "bias pair", "outlier", *kinds, "folded", "why"]]
    for layer in bad:
        sizes = [
            f"{layer['layer']}",
            f"{layer['key_bias']:.1f}",
            f"{layer['bias_pair']:.0f}x",
            f"{layer['outlier']:.1f}x",
        ]
        bits = [f"{layer['lost'][kind]:.1f}" for kind in kinds]
        rows.append([*sizes, *bits, f"{_worst(layer['lost_folded']):.1f}", _reason(layer)])
    lines = aligned(rows) if bad else []
    if fine:
        lines.append(f"layers {spans(fine)}: nothing in the way")
    if bad:
        lines += [
            "bias pair: the largest rotary pair of the bias, next to a channel of the key without it",
            "outlier: the largest channel of the key without bias, next to the median channel of its head",
            "token to fp8: bits that such a scale loses with the bias in K; folded: at most, with the bias kept out;",
            f"  {BROKEN['token']:g} make int8 no better than int4, {BROKEN['fp8']:g} are the whole mantissa of e4m3",
        ]
    return lines


def _scheme_lines(report: dict[str, Any]) -> list[str]:
    """Which schemes are broken by which layers, by kind of scale."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, verdict in report["schemes"].items():
        key = (verdict["kind"], spans(verdict["broken_by"]), spans(verdict["broken_in_octavo_by"]))
        groups.setdefault(key, []).append(name)
    rows = [["K scales", "broken by", "in Octavo", "schemes"]]
    for key in sorted(groups, key=lambda key: list(KINDS).index(key[0])):
        rows.append([*key, ", ".join(groups[key])])
    return aligned(rows)


def _heads(facts: dict[str, Any]) -> str:
    width = facts["head_dim"]
    limits = {
        "no power of two: the Hadamard rotation is of blocks": width & (width - 1) != 0,
        "no multiple of 8, which 3-bit codes need": width % 8 != 0,
        f"no multiple of {BLOCK}, which llama.cpp's blocks need": width % BLOCK != 0,
    }
    wrong = [text for text, is_so in limits.items() if is_so]
    return f"{width}: {'; '.join(wrong) or 'fits rotation, 3-bit codes and blocks of 32'}"


def _embeddings(facts: dict[str, Any]) -> str:
    """What embedding and lm_head in int8 would cost."""
    if facts["embedding_error"] is None:
        return f"embeddings stay in float: their channels make no groups of {SMALLEST_GROUP}"
    error = facts["embedding_error"]
    verdict = "take --embeddings int8" if error <= MOST_EMBEDDING_ERROR else "look at the KL with --embeddings int8"
    return f"embeddings in int8, groups of {SMALLEST_GROUP}: {100 * error:.2f} % off: {verdict}"


def _fact_rows(facts: dict[str, Any]) -> list[list[str]]:
    kinds = ", ".join(
        f"{count} {kind}{'' if kind in ATTENTIONS else ' (refused by the cache)'}"
        for kind, count in facts["layer_types"].items()
    )
    window = f", window {facts['sliding_window']}" if facts["sliding_window"] else ""
    is_partial = facts["rope_type"] in STEADY_ROPE_TYPES and not facts["key_is_normalized"]
    fold = "frequencies change with the length, a bias of K cannot be folded"
    if facts["bias_can_be_folded"]:
        fold = "frequencies stay, a bias of K can be folded"
    elif is_partial:
        fold = (
            "not alike for all channels and layers, or K is made with q and V: a bias of K cannot be folded everywhere"
        )
    normalized = ", normalized after its projection" if facts["key_is_normalized"] else ""
    biases = [f"{facts[key]:.1f} at most" if facts[key] else "none" for key in ("key_bias", "value_bias")]
    sizes = ", ".join(f"{name} {size:,}" for name, size in facts["cache_bytes_per_token"].items())
    passes = ", ".join(
        f"{name} {'never' if tokens is None else f'{tokens:,}'}"
        for name, tokens in facts["cache_passes_weights_at"].items()
    )
    return [
        ["head_dim", _heads(facts)],
        ["heads", f"{facts['kv_heads']} KV heads, {facts['query_heads_per_kv_head']} query heads each"],
        ["layers", f"{kinds}{window}"],
        ["rope", f"{facts['rope_type']}: {fold}"],
        ["bias norms", f"K {biases[0]}{normalized}, V {biases[1]}"],
        ["weights", f"{facts['weight_bytes'] / 1e9:.2f} GB in {facts['dtype']}, embeddings "
         f"{'tied' if facts['tied_embeddings'] else 'not tied'}"],
        ["", _embeddings(facts)],
        ["KV cache", f"bytes per token: {sizes}"],
        ["", f"as large as the weights at a length of: {passes}"],
    ]  # fmt: skip


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    facts = report["facts"]
    source = "weights and calibration statistics" if report["from_statistics"] else "weights alone"
    lines = [f"{report['model_path']}: {facts['model_type']}, {facts['layers']} layers, judged from {source}", ""]
    lines += [*_layer_lines(report), "", *_scheme_lines(report), "", *aligned(_fact_rows(facts)), ""]
    for bits, choice in report["recommendation"].items():
        lines.append(f"for {bits}: {choice['preset'] or 'none'}: {choice['reason']}")
    return "\n".join(line.rstrip() for line in lines)
