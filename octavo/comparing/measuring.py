"""Measurements that are kept, one file for each candidate, so that a comparison goes on where it was cut off."""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..common.convert.output.bundle import put_file
from ..common.errors import OctavoError
from ..common.runtime.version import VERSION
from ..evaluation.evaluating import FLOAT, Plan, evaluate
from ..evaluation.reading import longest_of
from ..evaluation.text import Kept, Read, in_chunks
from ..generate import Speaker
from ..planning.cache import cache_size
from .candidates import Candidate
from .conversions import DIGITS, model_digest

SHORTEST, LONGEST = 256, 131072
"""Tokens between which the bytes of a cache are told, as far as the model goes."""


def conditions_of_run(plan: Plan, directory: Path, device: str) -> dict[str, Any]:
    """All on which the figures of a run depend, but for what is measured; plain data, as JSON gives it back."""
    text = None if plan.text is None else hashlib.sha256(plan.text.encode()).hexdigest()[:DIGITS]
    found = {
        "version": VERSION,
        "model": model_digest(directory),
        "device": device,
        "threads": torch.get_num_threads(),
        **asdict(replace(plan, text=text)),
        "bits_at": plan.longest,
    }
    return json.loads(json.dumps(found))


def file_of(results: Path, name: str) -> Path:
    """Where the results of a candidate lie."""
    return results / f"{re.sub(r'[^A-Za-z0-9._+-]', '-', name)}.json"


def kept(file: Path, name: str, conditions: Mapping[str, Any]) -> dict[str, Any] | None:
    """Results of these conditions; None if there are none, and why on stderr if there are others."""
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        before = record["conditions"]
        changed = [key for key in {**before, **conditions} if before.get(key) != conditions.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        tqdm.write(f"{name}: measured again: {file} cannot be read", file=sys.stderr)
        return None
    if changed or record.get("name") != name:
        tqdm.write(f"{name}: measured again: other {', '.join(changed) or 'name'} than before", file=sys.stderr)
        return None
    return record


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        OctavoError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        put_file(file, text)
    except OSError as error:
        raise OctavoError(f"--out: {file} cannot be written ({error.strerror})") from None


def measure_all(
    reference: Speaker, candidates: Sequence[Candidate], plan: Plan, run: Mapping[str, Any], results: Path
) -> list[dict[str, Any]]:
    """The results of each candidate, measured where there are none of these conditions, and written at once.

    Args:
        run: conditions that all share.
        results: the directory of the files.

    Raises:
        OctavoError: something cannot be measured or written; what was measured before stays.
    """
    records, expected = [], Kept(in_chunks(reference))
    progress = tqdm(candidates, desc="compare", unit="candidate")
    for candidate in progress:
        progress.set_postfix_str(candidate.name)
        conditions = {**run, "definition": candidate.definition}
        file = file_of(results, candidate.name)
        record = kept(file, candidate.name, conditions)
        if record is None:
            record = _measured(reference, candidate, plan, conditions, expected)
            write_whole(file, json.dumps(record, indent=2) + "\n")
            record = json.loads(file.read_text(encoding="utf-8"))
        told = {"about": candidate.about, "command": candidate.command}
        records.append({**record, **told, **({} if candidate.step is None else {"step": candidate.step})})
    return records


def _measured(
    reference: Speaker, candidate: Candidate, plan: Plan, conditions: Mapping[str, Any], expected: Read
) -> dict[str, Any]:
    with candidate.speaker() as (speaker, weights):
        is_float = candidate.kind == FLOAT
        others = {} if is_float else {candidate.name: speaker}

        def found(part: Plan) -> dict[str, Any]:
            return evaluate(reference, others, part, is_float, expected)[candidate.name].as_json()

        whole = found(replace(plan, tasks=()))
        at_lengths = {}
        for length in plan.lengths if plan.tasks else ():
            part = found(replace(plan, text=None, lengths=(length,)))
            kept = {key: part[key] for key in ("recall", "seconds_per_token", "prompt_tokens_per_second")}
            at_lengths[length] = {"cache_bytes": part["cache_bytes"][length], **kept}
        return {
            "name": candidate.name,
            "kind": candidate.kind,
            "about": candidate.about,
            "command": candidate.command,
            "conditions": conditions,
            "bits": whole["bits"],
            "weight_bytes": weights,
            "text": whole["text"],
            "writing": whole["writing"],
            "lengths": at_lengths,
            "planned_cache_bytes": _planned(speaker),
        }


def _planned(speaker: Speaker) -> dict[int, int]:
    """Bytes in use of a cache by its tokens, up to what the model is made for."""
    config = speaker.model.config
    most = longest_of(speaker.model) or LONGEST
    tokens, found = min(SHORTEST, most), {}
    while tokens <= min(most, LONGEST):
        found[tokens] = cache_size(config, speaker.scheme, tokens, dtype=speaker.model.dtype, settles=True).kept
        tokens *= 2
    return found
