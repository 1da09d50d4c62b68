"""Damage of scheme files: presets with other values, which are refused, or are schemes that run."""

import functools
import math
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM

from octavo.common.architecture import REPOSITORY
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.schemes.kv_scheme import PRESETS, Scheme, load_scheme
from octavo.common.runtime.static_scales import load_statistics, scales_of
from octavo.common.stock_model import prepare

from ...support import with_cache
from ..bases import IDS
from ..json_damage import damage_json
from ..trial import Accepted, Attempt, Room

FIRST = 120
"""Tokens of the first of two passes."""


@functools.cache
def _model(source: Path) -> torch.nn.Module:
    """A float model of transformers that reads codes; one for all tries of a worker."""
    return prepare(AutoModelForCausalLM.from_pretrained(source, local_files_only=True).eval())


def _scales(scheme: Scheme, statistics: Path) -> list | None:
    return scales_of(scheme, load_statistics(statistics)) if scheme.is_static else None


def _try(file: Path, room: Room) -> Accepted:
    scheme = load_scheme(file)
    if load_scheme(scheme.to_dict()) != scheme:
        return Accepted(False, "it is another scheme once written and read again")
    model = _model(room.bases / "sources" / "llama")
    if not 0 < kv_bits_per_element(model.config, scheme) < math.inf:
        return Accepted(False, "it has no number of bits")
    cache = QuantizedCache(model.config, scheme, scales=_scales(scheme, room.bases / "statistics.safetensors"))
    with torch.inference_mode():
        passes = (IDS[:, :FIRST], IDS[:, FIRST:])
        logits = torch.cat([model(ids, **with_cache(cache)).logits for ids in passes], dim=1)
    if not torch.isfinite(logits).all():
        return Accepted(False, "logits are not finite")
    return Accepted(True)


def scheme(rng: Random, room: Room) -> Attempt:
    """A preset's file with damage; what is accepted has to run, and to be itself when written and read."""
    preset = rng.choice([name for name in PRESETS if not name.startswith("kvquant")])
    damaged = damage_json(
        rng, (REPOSITORY / "common" / "runtime" / "schemes" / "presets" / f"{preset}.json").read_bytes()
    )
    file = room.scratch / "scheme.json"
    file.write_bytes(damaged.text)
    return Attempt(f"{preset}: {damaged.what}", functools.partial(_try, file, room))
