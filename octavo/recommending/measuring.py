"""Schemes of a model's KV cache measured in turn, the fewest bits first."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..common.convert.measure.fidelity import Fidelity
from ..common.errors import OctavoError
from ..common.runtime.cache.sizes import kv_bytes_per_token
from ..common.runtime.schemes.kv_scheme import load_scheme
from ..comparing.candidates import ALL, scheme_names
from ..counting import counted_bits
from ..evaluation.evaluating import FLOAT, Plan, evaluate
from ..evaluation.recall import Score
from ..evaluation.text import Kept, in_chunks
from ..generate import Speaker, with_scheme
from ..wording import WHEN

OWN = tuple(name for name in WHEN if name.startswith(("octavo-", "int8-token")) and not load_scheme(name).is_static)
"""Schemes that are measured unless others are named: none needs calibration, nor an engine that reads it."""
CALIBRATED = tuple(name for name in WHEN if name.startswith("octavo-") and load_scheme(name).is_static)
"""Those that are measured beside them where there are statistics."""


@dataclass(frozen=True)
class Limits:
    """What a scheme may lose.

    Attributes:
        kl: KL(float || scheme), in nats.
        recall: of the share of right answers, in points of 100; None: recall is not asked for.
    """

    kl: float
    recall: float | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured of a scheme, or of the float model.

    Attributes:
        scheme: as it was named.
        bits: of an element of K and V, as `counted_bits`.
        token_bytes: that one more token takes, over all layers.
        fidelity: to the float model; None of itself.
        recall: None where it was not asked for.
        fault: by which limit it fails: "KL" or "recall"; empty where it keeps all of them.
    """

    scheme: str
    bits: float
    token_bytes: int
    fidelity: Fidelity | None
    recall: Score | None = None
    fault: str = ""

    @property
    def passes(self) -> bool:
        """Whether it is a scheme that keeps the limits."""
        return self.fidelity is not None and not self.fault

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**asdict(self), "passes": self.passes}


@dataclass(frozen=True)
class _Candidate:
    name: str
    speaker: Speaker
    bits: float
    token_bytes: int


def _candidate(name: str, reference: Speaker, context: int, statistics: Path | None) -> _Candidate:
    speaker = reference if name == FLOAT else with_scheme(reference, name, statistics)
    config, dtype = speaker.model.config.get_text_config(decoder=True), speaker.model.dtype
    speaker.new_cache()  # so that what the model does not bear is told before anything is measured
    bits = counted_bits(config, speaker.scheme, context, dtype)
    return _Candidate(name, speaker, bits, kv_bytes_per_token(config, speaker.scheme, dtype.itemsize))


def _candidates(
    asked: Sequence[str] | None, reference: Speaker, context: int, statistics: Path | None
) -> list[_Candidate]:
    """Those to measure, the fewest bits first; where none is named, those that the model bears."""
    found, leaves_out = [], asked is None or list(asked) == [ALL]
    own = OWN if statistics is None else (*OWN, *CALIBRATED)
    for name in own if asked is None else scheme_names(asked, statistics):
        try:
            found.append(_candidate(name, reference, context, statistics))
        except OctavoError as error:
            if not leaves_out:
                raise
            tqdm.write(f"{name}: left out: {error}", file=sys.stderr)
    if not found:
        raise OctavoError("--schemes: there is nothing to measure beside float; name schemes that this model bears")
    return sorted(found, key=lambda each: each.bits)


class Measurement:
    """Measures schemes beside a float model, whose logits are computed once.

    Args:
        reference: the float model.
        plan: text and windows; the recall that it asks for is of those schemes alone that keep the limit of KL.
        limits: that a scheme has to keep.
        context: tokens of the sequences in which bits are counted.
    """

    def __init__(self, reference: Speaker, plan: Plan, limits: Limits, context: int) -> None:
        self._reference, self._limits, self._context = reference, limits, context
        self._on_text, self._in_recall = replace(plan, tasks=()), replace(plan, text=None)
        self._expected = Kept(in_chunks(reference))
        self._float_recall: Score | None = None

    def run(self, asked: Sequence[str] | None, statistics: Path | None) -> list[Measured]:
        """The float model first, then schemes, the fewest bits first.

        Args:
            asked: names or files, or `ALL`, all of which are measured; None: `OWN`, and `CALIBRATED` if there are
                statistics, until one keeps the limits.
            statistics: of a calibration, for schemes that need one.

        Raises:
            OctavoError: the model does not bear a scheme that is asked for; the text is too short.
        """
        candidates = _candidates(asked, self._reference, self._context, statistics)
        found: list[Measured] = []
        progress = tqdm(candidates, desc="measure", unit="scheme", leave=False)
        for candidate in progress:
            progress.set_postfix_str(candidate.name)
            found.append(self._measured(candidate))
            if asked is None and found[-1].passes:
                break
        progress.close()
        return [self._float(), *found]

    def _float(self) -> Measured:
        own = _candidate(FLOAT, self._reference, self._context, None)
        return Measured(FLOAT, own.bits, own.token_bytes, None, self._float_recall)

    def _measured(self, candidate: _Candidate) -> Measured:
        name, others = candidate.name, {candidate.name: candidate.speaker}
        on_text = evaluate(self._reference, others, self._on_text, False, self._expected)[name]
        found = Measured(name, candidate.bits, candidate.token_bytes, on_text.fidelity)
        if not on_text.fidelity.kl <= self._limits.kl:
            return replace(found, fault="KL")
        if self._limits.recall is None:
            return found
        if self._float_recall is None:
            self._float_recall = self._recall(FLOAT, {})
        own = self._recall(name, others)
        lost = 100 * (self._float_recall.share - own.share)
        return replace(found, recall=own, fault="recall" if lost > self._limits.recall + 1e-9 else "")

    def _recall(self, name: str, others: dict[str, Speaker]) -> Score:
        (score,) = evaluate(self._reference, others, self._in_recall, name == FLOAT)[name].recall.values()
        return score
