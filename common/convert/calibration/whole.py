"""Calibration of a float model that is in memory as a whole: all that some schemes rest on."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm

from ...runtime.schemes.kv_scheme import Scheme
from ...runtime.static_scales import Statistics, statistics_facts
from .bases import find_bases
from .codebooks import fit_codebooks
from .observe import calibrate
from .sharpness import find_sharpness

_OF_WHOLE = re.compile(r"layers\..*\.(?:levels\.\d|before\.(?:low|high)|mean|balanced|oscar|sharpness)")


def is_of_whole(name: str) -> bool:
    """Whether a tensor of statistics comes from a whole model alone."""
    return _OF_WHOLE.fullmatch(name) is not None


def whole_statistics(
    model: Any, samples: list[dict[str, torch.Tensor]], schemes: Iterable[Scheme], found: Statistics | None = None
) -> Statistics:
    """Codebooks, bases and sharp layers where some scheme has any, added to what is `found` already.

    Raises:
        OctavoError: as what finds them.
    """
    schemes = list(schemes)
    found = Statistics({}, statistics_facts(model.config, 0)) if found is None else found
    if any(scheme.has_codebooks for scheme in schemes):
        found = fit_codebooks(model, samples, found)
    if any(scheme.has_bases for scheme in schemes):
        found = find_bases(model, samples, found)
    return find_sharpness(model, samples, found) if any(scheme.sharp_share for scheme in schemes) else found


def calibrate_whole(model: Any, samples: list[dict[str, torch.Tensor]], schemes: Iterable[Scheme]) -> Statistics:
    """Ranges of q, K and V, and what `whole_statistics` adds to them, and raises.

    The ranges are of the first sample alone where no scheme rests on them.
    """
    schemes = list(schemes)
    seen = samples if any(scheme.has_ranges for scheme in schemes) else samples[:1]
    return whole_statistics(model, samples, schemes, calibrate(model, [], tqdm(seen, desc="calibrating", unit="text")))
