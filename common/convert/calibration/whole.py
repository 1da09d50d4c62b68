"""Calibration of a float model that is in memory as a whole: all that some schemes rest on."""

from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm

from ...runtime.schemes.kv_scheme import Scheme
from ...runtime.static_scales import Statistics
from .bases import find_bases
from .codebooks import fit_codebooks
from .observe import calibrate

OF_WHOLE = (".levels.", ".before.", ".mean", ".balanced", ".oscar")
"""Parts of the names of statistics that come from a whole model alone."""


def calibrate_whole(model: Any, samples: list[dict[str, torch.Tensor]], schemes: Iterable[Scheme]) -> Statistics:
    """Ranges of q, K and V, and codebooks and bases where some scheme has any; raises as what finds them does."""
    schemes = list(schemes)
    found = calibrate(model, [], tqdm(samples, desc="calibrating", unit="text"))
    if any(scheme.has_codebooks for scheme in schemes):
        found = fit_codebooks(model, samples, found)
    return find_bases(model, samples, found) if any(scheme.has_bases for scheme in schemes) else found
