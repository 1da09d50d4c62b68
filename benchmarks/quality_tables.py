"""The tables of what schemes lose on text, from `results/quality.csv`, and of the bits that they take."""

from quality import FILE, FLOAT_WEIGHTS, PROSE, UNFOLDED
from rows import Row, markdown, read_rows, scores
from transformers import LlamaConfig

from models import SHAPES
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.schemes.kv_scheme import CROP_ROOM, PRESETS, load_scheme
from octavo.wording import codec_words

MODELS_SCORED = ("smollm2-135m", "qwen2.5-coder-0.5b")
TEXTS = (PROSE, "news")
"""By their files: English Wikipedia, and the Lee corpus of news, which comes with gensim."""
WINDOWS = {"smollm2-135m": "2", "qwen2.5-coder-0.5b": "1"}
"""Windows of the rows that come before others: all schemes can be compared on them."""
LENGTHS = (2048, 8192, 32768)
SIZES_OF = "SmolLM2-135M"
OURS = "octavo-"
"""How the names of Octavo's own schemes begin."""


def quality_of(model: str, windows: str | None = None, text: str = PROSE) -> dict[str, Row]:
    """The newest row of each scheme, variant and checkpoint of a model, of so many windows or of the most there are."""
    found: dict[str, Row] = {}
    for row in read_rows(FILE):
        if row["model"] != model or windows not in (None, row["windows"]) or (row["text"] or PROSE) != text:
            continue
        if row["what"] not in found or int(row["windows"]) >= int(found[row["what"]]["windows"]):
            found[row["what"]] = row
    return found


def bits_at(name: str, length: int, crop_room: int = 0) -> float:
    """Bits of an element of K and V in a sequence of so many tokens, on a model of SmolLM2's sizes."""
    return kv_bits_per_element(LlamaConfig(**SHAPES[SIZES_OF]), load_scheme(name), length, crop_room)


def bits_table() -> str:
    """What each preset is, and its bits, counted."""
    lengths = [f"bits at {length:,}" for length in LENGTHS]
    rows = [("scheme", "K", "V", "calibration", *lengths, f"stored at {LENGTHS[0]:,}")]
    for name in sorted(PRESETS, key=lambda name: -bits_at(name, LENGTHS[0])):
        scheme = load_scheme(name)
        if scheme.is_quantized:
            bits = [f"{bits_at(name, length):.2f}" for length in LENGTHS]
            words = (codec_words(scheme.key), codec_words(scheme.value), "yes" if scheme.is_static else "")
            rows.append((f"`{name}`", *words, *bits, f"{bits_at(name, LENGTHS[0], CROP_ROOM):.2f}"))
    return (
        f"{markdown(rows, 4)}\n\nBits of an element of K and V, counted for SmolLM2-135M: codes, scales, zeros, "
        "codebooks, outliers, sinks and windows. The last column counts as well what a cache keeps in 16 bits beside "
        f"the codes of its newest {CROP_ROOM} tokens, so that they can be cropped (`crop_room`). Means and bases of K "
        "and V from calibration (`-c`, `-tc`, `oscar-2`) are weights, D (D + 1) floats of a KV head, and not counted."
    )


def schemes_tables() -> str:
    """What Octavo's own schemes lose, and then what those of others do, on every model that was scored."""
    found = {
        (text, model): quality_of(model, None, text) | quality_of(model, WINDOWS[model], text)
        for text in TEXTS
        for model in MODELS_SCORED
    }
    if not any(found.values()):
        return "No quality is measured yet."
    presets = [name for name in PRESETS if any(FLOAT_WEIGHTS + name in rows for rows in found.values())]
    presets.sort(key=lambda name: -bits_at(name, LENGTHS[0]))
    ours = [name for name in presets if name.startswith(OURS)]
    others = [name for name in presets if not name.startswith(OURS)]
    used = [rows for rows in found.values() if rows]
    return (
        f"Octavo's own:\n\n{_scores_table(ours, found)}\n\n"
        f"Those of others, and how many times the KL of Octavo's scheme of at most the same bits they have:\n\n"
        f"{_scores_table(others, found, ours)}\n\n{_conditions(used)}"
    )


Found = dict[tuple[str, str], dict[str, Row]]
"""Rows by text and model."""


def _scores_table(names: list[str], found: Found, ours: list[str] | None = None) -> str:
    """Scores of schemes on prose, and KL on news; with how many times those of `ours` they are."""
    heads = [f"{model}: {part}" for model in MODELS_SCORED for part in ("KL", "perplexity", "top-1", "KL on news")]
    rows = [("scheme", "bits", *heads, *([] if ours is None else [f"{model}: times" for model in MODELS_SCORED]))]
    for name in names:
        for what, label in ((name, f"`{name}`"), (name + UNFOLDED, "the same, with the bias in")):
            if any(FLOAT_WEIGHTS + what in rows for rows in found.values()):
                cells = [cell for model in MODELS_SCORED for cell in _cells(found, model, what)]
                times = [] if ours is None else [_times(found[PROSE, model], what, ours) for model in MODELS_SCORED]
                rows.append((label, f"{bits_at(name, LENGTHS[0]):.2f}", *cells, *times))
    return markdown(rows, 1)


def _cells(found: Found, model: str, what: str) -> tuple[str, ...]:
    """Scores on prose, and KL on news."""
    prose, news = (found[text, model].get(FLOAT_WEIGHTS + what) for text in TEXTS)
    return *scores(prose), scores(news)[0]


def _times(rows: dict[str, Row], what: str, ours: list[str]) -> str:
    """How many times the KL of the best of ours of at most the same bits a scheme has, and which that is."""
    row = rows.get(FLOAT_WEIGHTS + what)
    scored = {name: rows[FLOAT_WEIGHTS + name] for name in ours if FLOAT_WEIGHTS + name in rows}
    fitting = {
        name: float(own["kl"]) for name, own in scored.items() if row and float(own["bits"]) <= float(row["bits"])
    }
    if row is None or not fitting:
        return ""
    best = min(fitting, key=fitting.__getitem__)
    return f"{float(row['kl']) / fitting[best]:.1f} `{best}`"


def _conditions(found: list[dict[str, Row]]) -> str:
    windows: dict[str, set[str]] = {}
    for row in (row for rows in found for row in rows.values()):
        windows.setdefault(row["model"], set()).add(row["windows"])
    counts = " and ".join(
        f"{' or '.join(sorted(count))} window{'s' if count != {'1'} else ''} of {model}"
        for model, count in windows.items()
    )
    return (
        f"KL(float || quantized) in nats per token, change of the perplexity, and share of tokens whose likeliest next "
        f"token is the same: {counts}, 2,048 tokens each, of English Wikipedia (news: of the Lee corpus, which gensim "
        "brings), teacher-forced, every query reading what is stored. Bits are those of 2,048 tokens. Static schemes "
        "are calibrated on 50 BoolQ prompts."
    )


def scored_as(found: list[dict[str, Row]], what: str) -> tuple[str, ...]:
    """Bits and the scores of each model of one scheme or variant."""
    bits = next((f"{float(rows[what]['bits']):.2f}" for rows in found if what in rows), "")
    return bits, *(score for rows in found for score in scores(rows.get(what)))


def options_table() -> str:
    """Schemes with one option changed, beside the schemes themselves, as far as both were scored alike."""
    found = [quality_of(model, WINDOWS[model]) for model in MODELS_SCORED]
    bases = {what.partition(", ")[0] for rows in found for what in rows if ", " in what and not what.endswith(UNFOLDED)}
    if not bases:
        return "No options are measured yet."
    names = [f"{model}: {what}" for model in MODELS_SCORED for what in ("KL", "perplexity", "top-1")]
    rows = [("scheme", "bits", *names)]
    for base in sorted(bases):
        whats = [base, *dict.fromkeys(what for quality in found for what in quality if what.startswith(f"{base}, "))]
        rows += [
            (what.removeprefix(FLOAT_WEIGHTS), *scored_as(found, what)) for what in whats if not what.endswith(UNFOLDED)
        ]
    return f"{markdown(rows, 1)}\n\n{_conditions(found)}"
