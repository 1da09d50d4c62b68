"""What a campaign found: figures by kind and end, and a line for each failure."""

from collections import Counter
from collections.abc import Sequence

from octavo.common.command import aligned

from .kinds import KINDS
from .outcomes import BAD, GOOD, Result

LONGEST_DETAIL = 400


def table(results: Sequence[Result]) -> str:
    """Tries by kind and end, aligned; ends that none had are left out, but for the failures that nobody wants."""
    counts = Counter((result.kind, result.end) for result in results)
    ends = [end for end in (*GOOD, *BAD) if any(result.end == end for result in results)]
    kinds = [kind for kind in KINDS if any(result.kind == kind for result in results)]
    rows = [["", *ends, "tries"]]
    for kind in kinds:
        found = [counts[kind, end] for end in ends]
        rows.append([kind, *(str(count or "-") for count in found), str(sum(found))])
    totals = [sum(counts[kind, end] for kind in kinds) for end in ends]
    rows.append(["all", *map(str, totals), str(len(results))])
    return "\n".join(aligned(rows, texts=1))


def extremes(results: Sequence[Result]) -> str:
    """The longest try and the one that took the most memory."""
    if not results:
        return "no tries"
    slow = max(results, key=lambda result: result.seconds)
    large = max(results, key=lambda result: result.megabytes)
    return (
        f"at most {slow.seconds:.1f} s of processor time (try {slow.number}, {slow.kind}) "
        f"and {large.megabytes:.0f} MB (try {large.number}, {large.kind})"
    )


def failure_line(result: Result, seed: int) -> str:
    """A failure, and the command that shows it again."""
    detail = " ".join(result.detail.split())[:LONGEST_DETAIL]
    again = f"python -m tests.campaign --seed {seed} --only {result.number}"
    return f"{result.end}: {result.kind}: {result.what}: {detail}\n    {again}"
