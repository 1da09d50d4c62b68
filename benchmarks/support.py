"""The table of architectures: a row for each folder of models/, from what it states."""

from importlib import import_module

from rows import RESULTS, read_rows

from octavo.common.architecture import architecture_names, load_architecture
from octavo.common.runtime.decoder import Decoder

SLIDING_HEAD = ("model", "scheme", "tokens", "keeping all, MiB", "forgetting, MiB", "times less")
HEAD = ("folder of `models/`", "`model_type`", "checkpoints", "anatomy, beside Llama's", "quality measured on")
ARCHITECTURES = {"smollm2": "llama3", "qwen2.5": "qwen2"}
"""Folder by how the name of a scored model begins."""
TINY = "tiny random models"


def anatomy(decoder: Decoder) -> str:
    """What a decoder has that Llama's has not, in words."""
    heads = decoder.attention.key_norm is not None
    marks = {
        "q, k and v in one linear": decoder.attention.is_fused,
        "gate and up in one": decoder.mlp.is_fused,
        "norms of q and k": heads,
        f"{2 + len(decoder.output_norms)} norms a layer": bool(decoder.output_norms),
        "norms that multiply by 1 + w": decoder.norm_offset == 1.0,
        "scaled embeddings": decoder.embedding_scale is not None or decoder.states_scale is not None,
        "RoPE on a part of a head": decoder.is_partly_rotated,
        "layers without RoPE": decoder.skips_rotation,
        "divided logits": decoder.logits_divisor is not None,
        "capped logits": decoder.caps_logits,
        "experts, each quantized on its own, and routers in float": decoder.experts is not None,
    }
    return ", ".join(words for words, is_so in marks.items() if is_so)


def scored_on(name: str) -> str:
    """The models of an architecture that quality.csv has rows of."""
    scored = dict.fromkeys(row["model"] for row in read_rows(RESULTS / "quality.csv"))
    own = [model for model in scored if any(model.startswith(s) and n == name for s, n in ARCHITECTURES.items())]
    return ", ".join(own) or TINY


def support_rows() -> list[tuple[str, ...]]:
    """The table, its head first."""
    rows = [HEAD]
    for name in architecture_names():
        architecture = load_architecture(name)
        checkpoints = import_module(f"octavo.models.{name}").__doc__.partition(":")[0]
        rows.append(
            (f"`{name}`", f"`{architecture.model_type}`", checkpoints, anatomy(architecture.decoder), scored_on(name))
        )
    return rows


def sliding_rows() -> list[tuple[str, ...]]:
    """What caches take whose layers slide, as `sliding.py` measured it last, the head first."""
    newest = {(row["model"], row["scheme"]): row for row in read_rows(RESULTS / "sliding.csv")}
    rows = [SLIDING_HEAD]
    for (model, scheme), row in newest.items():
        less = float(row["keeping_all"]) / float(row["forgetting"])
        rows.append(
            (model, f"`{scheme}`", f"{int(row['tokens']):,}", row["keeping_all"], row["forgetting"], f"{less:.1f}")
        )
    return rows
