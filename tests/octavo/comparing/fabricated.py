"""Records of a comparison as `measure_all` writes them, of figures that nobody measured."""

from typing import Any

HOSTILE = '<script>alert("x")</script>&'


def record(
    name: str,
    bits: float,
    kl: float | None = None,
    right: int = 10,
    kind: str = "scheme",
    lengths: tuple[int, ...] = (512,),
) -> dict[str, Any]:
    """Of a candidate that answers so many questions of 10 at each length."""
    text = {"tokens": 511, "kl": kl, "perplexity": 20.0 + (kl or 0), "float_perplexity": 20.0, "top1": 0.97}
    return {
        "name": name,
        "kind": kind,
        "about": f"about {name}",
        "command": f"octavo run model --scheme {name}",
        "conditions": {"bits_at": 2048},
        "bits": bits,
        "weight_bytes": 10_000_000,
        "text": None if kl is None else text,
        "writing": None if kl is None else {"first": [4, 8], "tokens": 8},
        "lengths": {
            str(length): {
                "cache_bytes": int(bits * length * 100),
                "seconds_per_token": 0.01 + bits * length * 1e-7,
                "prompt_tokens_per_second": 500.0,
                "recall": [{"task": "key-value", "length": length, "right": right, "asked": 10}],
            }
            for length in lengths
        },
        "planned_cache_bytes": {str(tokens): int(bits * tokens * 100) for tokens in (256, 512, 1024, 2048)},
    }


def float_record(right: int = 10, lengths: tuple[int, ...] = (512,)) -> dict[str, Any]:
    """Of the float model."""
    return record("float", 32.0, None, right, "float", lengths)


def some_records(lengths: tuple[int, ...] = (512,)) -> list[dict[str, Any]]:
    """Of several, one of them with a name that is to be escaped."""
    return [
        float_record(lengths=lengths),
        record("int8-token", 8.5, 0.0004, lengths=lengths),
        record("octavo-4", 4.6, 0.006, 9, lengths=lengths),
        record("int4-token", 4.5, 0.08, 7, lengths=lengths),
        record(HOSTILE, 2.4, 0.4, 2, lengths=lengths),
        record("preset eight-bit", 8.5, 0.004, kind="preset", lengths=lengths),
    ]


def many_records(lengths: tuple[int, ...] = (512,)) -> list[dict[str, Any]]:
    """As many as there are schemes and presets, with long names, some of them equal to a hair."""
    schemes = [
        record(
            f"{'a-long-name-of-' * (index % 2)}scheme-{index}", bits, 4.0 ** -(bits + index % 3 / 9), lengths=lengths
        )
        for index, bits in enumerate(2 + 0.25 * index for index in range(26))
    ]
    presets = [
        record(f"preset number-{index}", 8.5, 0.004 + index * 1e-5, kind="preset", lengths=lengths)
        for index in range(7)
    ]
    return [float_record(lengths=lengths), *schemes, *presets]


def step_records(lengths: tuple[int, ...] = (512,)) -> list[dict[str, Any]]:
    """Of a preset, option by option; the rounding of its linears makes good what they lose, and lm_head costs time."""
    found = []
    for option, kl, megabytes in (("cache", 0.001, 540), ("linears", 0.301, 200), ("rounding", 0.101, 200)):
        each = record(f"four up to {option}", 8.5, kl, kind="step", lengths=lengths)
        found.append({**each, "weight_bytes": megabytes * 1_000_000})
    found.append({**record("preset four", 8.5, 0.111, kind="preset", lengths=lengths), "weight_bytes": 100_000_000})
    options = ("cache", "linears", "rounding", "embeddings")
    return [
        {**each, "step": {"of": "four", "option": option, "stated": f"--{option} <b>"}}
        for each, option in zip(found, options, strict=True)
    ]
