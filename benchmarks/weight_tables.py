"""Tables of linears, out of the rows that `weights.py` appends."""

from rows import RESULTS, Row, markdown, read_rows, scores
from weights import CONDITIONS, RECIPE, grid

from octavo.common.convert.flag_values import ACT_METHOD_NAMES
from octavo.common.runtime.schemes.linear_scheme import W8A8

HEAD = ("linears", "K and V", "in float", "anti_method", "act_method", "w_method", "bits", "MB", "KL", "perplexity",
        "top-1")  # fmt: skip


def _weights() -> dict[str, list[Row]]:
    """By model, in the order of the grid: the newest row of each case under the conditions of the newest row of all."""
    rows, order = read_rows(RESULTS / "weights.csv"), [setting.name for setting in grid()]
    newest = {row["model"]: row for row in rows}
    found: dict[str, dict[str, Row]] = {model: {} for model in newest}
    for row in rows:
        if all(row[column] == newest[row["model"]][column] for column in CONDITIONS):
            found[row["model"]][row["case"]] = row
    return {model: [cases[name] for name in order if name in cases] for model, cases in found.items()}


def _is_recipe(row: Row) -> bool:
    """Whether a row is one of Ascend's recipe, static W8A8 and C8, which stand in a matrix."""
    kind = row["kind"], row["cache"], row["linears"]
    return kind == (W8A8, "ascend-c8", "recipe") and not row["case"].startswith(RECIPE)


def _matrix(rows: list[Row]) -> str:
    """KL by `--anti_method` and `--act_method`, the least one bold."""
    found = {(row["anti_method"], row["act_method"]): float(row["kl"]) for row in rows}
    antis = list(dict.fromkeys(anti for anti, _ in found))
    acts = [act for act in ACT_METHOD_NAMES if any(act == other for _, other in found)]
    least = min(found.values())

    def cell(anti: str, act: str) -> str:
        if (anti, act) not in found:
            return ""
        kl = found[anti, act]
        return f"**{kl:.5f}**" if kl == least else f"{kl:.5f}"

    named = [act if act == ACT_METHOD_NAMES[act] else f"{act} ({ACT_METHOD_NAMES[act]})" for act in acts]
    lines = [("anti_method", *(f"act_method {name}" for name in named))]
    lines += [(anti or "none", *(cell(anti, act) for act in acts)) for anti in antis]
    return markdown(lines)


def _weights_row(row: Row) -> tuple[str, ...]:
    methods = (row["anti_method"] or "none", row["act_method"], row["w_method"])
    in_float = row["linears"].replace("*.", "")
    return row["kind"], row["cache"], in_float, *methods, row["bits"], row["megabytes"], *scores(row)


def _weights_conditions(row: Row) -> str:
    windows = "1 window" if row["windows"] == "1" else f"{row['windows']} windows"
    return (
        "KL(float || quantized) in nats per token, change of the perplexity, and share of tokens whose likeliest next "
        f"token is the same, of {row['model']}: {windows} of {int(row['length']):,} tokens of "
        f"{row['text']}, teacher-forced; calibrated on {row['calibration']}; bits of a weight of the quantized linears "
        "of layers, scales and zero points counted, of rows that have them; MB of safetensors. `recipe` leaves the "
        "linears in float that Ascend's recipe leaves. A group that does not divide a linear's input channels is the "
        "next smaller multiple of 32 that does."
    )


def weights_table() -> str:
    """What treatments of outliers, ranges of inputs, and kinds of linears do to each model."""
    parts = []
    for model, rows in _weights().items():
        parts.append(f"**{model}**")
        matrix, others = [row for row in rows if _is_recipe(row)], [row for row in rows if not _is_recipe(row)]
        if matrix:
            parts += ["KL of static W8A8 with Ascend's recipe, and C8:", _matrix(matrix)]
        if others:
            parts.append(markdown([HEAD, *map(_weights_row, others)], 6))
        parts.append(_weights_conditions(rows[0]))
    return "\n\n".join(parts) or "No weights are measured yet."


def best_weights_table() -> str:
    """Of each kind of linears, cache and set of linears in float, the row of the least KL."""
    parts = []
    for rows in _weights().values():
        best: dict[tuple[str, str, str], Row] = {}
        for row in rows:
            kind = row["kind"], row["cache"], row["linears"]
            if kind not in best or float(row["kl"]) < float(best[kind]["kl"]):
                best[kind] = row
        parts += [markdown([HEAD, *map(_weights_row, best.values())], 6), _weights_conditions(rows[0])]
    return "\n\n".join(parts) or "No weights are measured yet."
