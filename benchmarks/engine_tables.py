"""Tables of whole models beside other engines, out of the rows that `engines.py` appends."""

from engine_cases import NATIVE
from engine_turns import FILE, MOST_OF_OTHERS
from rows import RESULTS, Row, markdown, read_rows

CASE = ("model", "isa", "batch", "contender", "context")
MODELS = {"llama-1b-random": "Llama of 1B's shape, random"}
"""Names of models in words."""


def newest_rows(rows: list[Row]) -> list[Row]:
    """Of each case the newest row that has a figure, or the newest, of the processor and threads of the newest row."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if any(row[column] != rows[-1][column] for column in ("machine", "threads")):
            continue
        key = tuple(row[column] for column in CASE)
        if row["step_ms"] or key not in found:
            found[key] = row
    return list(found.values())


def _figure(rows: list[Row], name: str, context: str, column: str, digits: int) -> str:
    """A figure of a contender, bold where no other of its kind has less."""
    row = next((row for row in rows if (row["contender"], row["context"]) == (name, context)), None)
    if row is None or not row[column]:
        return ""
    kind = (row["kind"], context)
    beside = [float(other[column]) for other in rows if (other["kind"], other["context"]) == kind and other[column]]
    figure = f"{float(row[column]):,.{digits}f}"
    return f"**{figure}**" if len(beside) > 1 and float(row[column]) == min(beside) else figure


def _lines(model: str, rows: list[Row], contexts: list[str]) -> list[tuple[str, ...]]:
    """The lines of a model: contenders by kind."""
    lines, short = [], contexts[0]
    for kind, name in dict.fromkeys((row["kind"], row["contender"]) for row in rows):
        steps = [_figure(rows, name, context, "step_ms", 1) for context in contexts]
        others = [_figure(rows, name, short, *what) for what in (("first_s", 2), ("peak_mb", 0), ("kl", 4))]
        lines.append((MODELS.get(model, model), kind, name, *steps, *others))
    return lines


def _conditions(rows: list[Row], isa: str, batch: str) -> str:
    systems = ", ".join(dict.fromkeys(row["system"] for row in rows if row["system"]))
    limited = "" if isa == NATIVE else ", all limited to AVX2"
    windows = next((row["windows"] for row in rows if row["windows"]), "")
    sentences = [
        f"Medians of turns, each a process of its own: {rows[0]['machine']}, {rows[0]['threads']} CPU threads, "
        f"batch {batch}{limited}; {systems or 'nothing ran'}.",
        "Bold is the least of each kind; peak is resident memory of the process, at the shortest context.",
    ]
    if windows:
        sentences.append(
            f"KL(float32 || engine) in nats per token, on the second halves of {windows} windows of 2,048 tokens of "
            "English Wikipedia, read in chunks."
        )
    noise = max((float(row["others_cpus"]) for row in rows if row["others_cpus"]), default=0.0)
    if noise > MOST_OF_OTHERS:
        sentences.append(f"Other processes took up to {noise:.2f} CPUs meanwhile.")
    notes = dict.fromkeys(f"{row['contender']}, {row['model']}: {row['note']}" for row in rows if row["note"])
    return " ".join(sentences + [f"No figure: {note}." for note in notes])


def engines_table(isa: str = NATIVE, batch: str = "1") -> str:
    """Whole models beside other engines, limited to some instructions, so many sequences at once."""
    rows = [row for row in newest_rows(read_rows(RESULTS / FILE)) if (row["isa"], row["batch"]) == (isa, batch)]
    if not rows:
        return "No engine is measured yet."
    contexts = sorted({row["context"] for row in rows}, key=int)
    steps = [f"ms a token at {int(context):,}" for context in contexts]
    lines = [("model", "kind", "engine", *steps, f"first token of {int(contexts[0]):,}, s", "peak, MB", "KL")]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += _lines(model, [row for row in rows if row["model"] == model], contexts)
    return f"{markdown(lines, 3)}\n\n{_conditions(rows, isa, batch)}"


def other_engines_tables() -> str:
    """What is measured beyond the table of README: other batches, and all limited to AVX2."""
    cases = dict.fromkeys((row["isa"], row["batch"]) for row in newest_rows(read_rows(RESULTS / FILE)))
    tables = [engines_table(*case) for case in cases if case != (NATIVE, "1")]
    return "\n\n".join(tables) or "No other batch is measured yet, and nothing limited to AVX2."
