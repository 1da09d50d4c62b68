"""What a conversion made: sizes, fidelity, and what is quantized how."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..command import aligned
from ..runtime.cache.sizes import COUNTED_LENGTH
from ..runtime.schemes.kv_scheme import Scheme
from ..runtime.schemes.linear_scheme import CPU_ACTIVATIONS, LinearScheme
from .measure.costs import Cost
from .measure.fidelity import Fidelity
from .output.writer import write_json
from .request import OWN_FORMAT

FEW_TOKENS = 100
"""Below this the summary says that its figures mean little."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion made, as `convert` returns it.

    Attributes:
        model: directory of the float checkpoint.
        output: directory that was written.
        architecture: folder under `models/`.
        scheme: of KV cache and attention; its `float_layers` are those whose attention stays in float.
        linear: of the linears that are quantized; None if none is.
        linears: label by name of the linears that are quantized.
        source_codes: how the source holds its linears in codes, which stay as they are ("awq", "gptq", ...); None if
            they were quantized here.
        chosen_floats: linears and attentions that stay in float for their outliers or costs (`float_outliers`,
            `float_costliest`).
        odd_groups: input channels and size of the groups of linears that cannot have groups of `linear.group_size`.
        float_bytes: of the float checkpoint's safetensors files.
        output_bytes: of all files of the output.
        bits_per_weight: of the quantized linears of layers on the disk, scales and zero points counted; None of none.
        float_kv_bytes_per_token, kv_bytes_per_token: in the KV cache of the float and of the quantized model.
        float_kv_bits, kv_bits: that an element of K and V takes in sequences of `COUNTED_LENGTH` tokens, scales, sinks
            and all else that its scheme stores counted.
        texts: how many there are to calibrate on, those held back included.
        held_back_texts: how many of them only the comparison saw; the one text there is serves for both.
        embeddings: of the embedding and the last linear: "float", or "int8".
        cpu_activations: what weight-only linears multiply with on the CPU; None if there are none.
        fidelity: of the quantized model to the float one over the held-back texts; None if no token could be predicted.
        other_fidelity: the same with the other of `cpu_activations`; None where that is the same, as on other devices.
        costs: what quantizing each linear and attention alone costs; empty if that was not measured, which it is for
            `float_costliest` and `max_kl`.
        unreached: names of the experts that no calibration token chose, where anything follows from their inputs: they
            were calibrated on the tokens of all.
        seconds: that the conversion took; of one that was resumed, since then.
        format: that the output is in.
        notes: of an engine's format, what of it is not as in ours, and the commands that serve it; of a `target`, its
            command.
    """

    model: Path
    output: Path
    architecture: str
    scheme: Scheme
    linear: LinearScheme | None
    linears: Mapping[str, str]
    source_codes: str | None
    chosen_floats: tuple[str, ...]
    odd_groups: tuple[tuple[int, int], ...]
    float_bytes: int
    output_bytes: int
    bits_per_weight: float | None
    float_kv_bytes_per_token: int
    kv_bytes_per_token: int
    float_kv_bits: float
    kv_bits: float
    texts: int
    held_back_texts: int
    embeddings: str
    cpu_activations: str | None
    fidelity: Fidelity | None
    other_fidelity: Fidelity | None
    costs: tuple[Cost, ...]
    unreached: tuple[str, ...]
    seconds: float
    format: str = OWN_FORMAT
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """The lines that the conversion scripts print."""
        took = f"took {duration(self.seconds)}"
        return "\n".join([*_figures(self), *_conditions(self), *_contents(self), took, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which JSON can hold."""
        plain = asdict(self) | {"scheme": self.scheme.to_dict()}
        return plain | {"model": str(self.model), "output": str(self.output)}

    def save(self, file: str | Path) -> None:
        """Write `to_dict` as JSON.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(Path(file), self.to_dict())


def duration(seconds: float) -> str:
    """Seconds in words, as "7.9 s", "1 min 19 s" and "2 h 5 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _weight_bits(report: ConversionReport) -> list[tuple[str, str, str]]:
    if report.bits_per_weight is None:
        return []
    return [("weights of layers in codes, bits each, all counted", "", f"{report.bits_per_weight:.2f}")]


def _figures(report: ConversionReport) -> list[str]:
    """Sizes and fidelity before and after, as a table."""
    fidelity = report.fidelity
    rows = [
        ("", report.source_codes or "float", "quantized"),
        ("checkpoint, MB", f"{report.float_bytes / 1e6:.1f}", f"{report.output_bytes / 1e6:.1f}"),
        *_weight_bits(report),
        ("KV cache, bytes per token", str(report.float_kv_bytes_per_token), str(report.kv_bytes_per_token)),
        (
            f"KV cache, bits per element at {COUNTED_LENGTH:,} tokens",
            f"{report.float_kv_bits:g}",
            f"{report.kv_bits:.2f}",
        ),
    ]
    if fidelity is not None:
        rows.append(("perplexity", f"{fidelity.float_perplexity:.3f}", f"{fidelity.perplexity:.3f}"))
        rows.append(("KL(float || quantized), nats per token", "", f"{fidelity.kl:.5f}"))
    if report.other_fidelity is not None:
        other = next(other for other in CPU_ACTIVATIONS if other != report.cpu_activations)
        rows.append((f"the same, inputs of linears in {other}", "", f"{report.other_fidelity.kl:.5f}"))
    return aligned(rows, texts=1)


def _conditions(report: ConversionReport) -> list[str]:
    """On what the fidelity was measured."""
    fidelity, lines = report.fidelity, []
    if fidelity is not None:
        held_back = f"{report.held_back_texts} text(s) held back from calibration"
        where = held_back if report.texts > 1 else "the one calibration text"
        lines.append(f"perplexity and KL over {fidelity.tokens} tokens of {where}")
        if fidelity.tokens < FEW_TOKENS:
            lines.append(f"fewer than {FEW_TOKENS} tokens: give more calibration texts for figures that mean something")
    return lines


def _contents(report: ConversionReport) -> list[str]:
    """What was written, and what of it is not as it was asked for."""
    labels = " and ".join(sorted(set(report.linears.values())))
    linears = f"{len(report.linears)} linears in {labels}" if report.linears else "linears in float"
    if report.source_codes is not None:
        linears += f", in the codes of the source ({report.source_codes})"
    if report.embeddings != "float":
        linears += f", embedding and last linear in {report.embeddings}"
    if report.cpu_activations is not None:
        linears += f" (inputs on the CPU in {report.cpu_activations})"
    floats = ", ".join(map(str, report.scheme.float_layers))
    attention = f"attention {report.scheme.name}" + (f" but for layers {floats}" if floats else "")
    lines = [f"wrote {report.output}: {linears}, {attention}"] + [
        f"linears of {in_features} input channels have groups of {group}: {report.linear.group_size} do not divide them"
        for in_features, group in report.odd_groups
    ]
    if report.unreached:
        count, first = len(report.unreached), report.unreached[0]
        lines.append(f"no calibration text reaches {count} expert(s), as {first}: calibrated on the tokens of all")
    return lines
