"""What a conversion is asked for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..architecture import Architecture
from ..command import DEVICES
from ..errors import OctavoError
from ..runtime.schemes.kv_scheme import Scheme
from ..runtime.schemes.linear_scheme import (
    CPU_ACTIVATIONS,
    EMBEDDINGS,
    FP8_DYNAMIC,
    LINEAR_LABELS,
    SMALLEST_GROUP,
    W4A16,
    W4A16_DOUBLE,
    WEIGHT_ONLY,
    LinearScheme,
)

ANTI_METHODS = ("", "m1", "m2", "m3", "m4", "m6")
NO_M5 = (
    "m5 is CBQ, which trains the weights of several layers together; m4 and m6 are the exact rewrites that come closest"
)
OWN_FORMAT = "ascend"
"""What a conversion writes itself, and every other format is made of."""
KV_SCALES = ("data", "random", "none", "source")
VLLM_ASCEND_0_23 = "vllm-ascend-0.23"
TARGETS = ("mindie", VLLM_ASCEND_0_23, "vllm-ascend")
"""Engines that a directory may be for, see `Reader`; the second is vllm-ascend before 0.25."""
LINEAR_NAMES = {"float": None, **{label.lower(): label for label in LINEAR_LABELS}, "fp8": FP8_DYNAMIC,
    "w8a8fp8_dynamic": FP8_DYNAMIC}  # fmt: skip
"""Labels by the names of linears, as MindIE spells them, and by those of vLLM and vllm-ascend for fp8; None leaves
linears in float."""
DEFAULT_GROUP = {W4A16: 64, W4A16_DOUBLE: SMALLEST_GROUP}
"""Input channels that share a scale of a weight, unless a number is given; 0 of labels that are not here."""
DEFAULT_LINEAR = LinearScheme()
"""How linears are quantized unless it is said; the same that is asked for is another object, by which it is told."""
FOR_LINEARS = {
    "anti_method": "", "float_linears": None, "float_head": True, "float_outliers": 0, "cpu_activations": "int8",
}  # fmt: skip
"""Fields that mean nothing where every linear stays in float, and what they are unless given."""
NOT_DECISIVE = ("model", "output", "architecture", "scheme", "linear", "calibration", "resume", "format")
"""Fields that the bytes of an output do not follow from, or not from what is written in them."""
ONLY_WHETHER = ("max_kl", "save_statistics")
"""Fields of which only matters whether they are given."""


@dataclass(frozen=True)
class ConvertRequest:
    """One conversion of a float checkpoint, as `convert` takes it. All but the first two have defaults.

    What can be checked without touching a file is checked here; the rest by `convert`.

    Attributes:
        model: directory of the checkpoint (safetensors), or a hub id: in float, or with linears in the codes of AWQ,
            GPTQ, compressed-tensors or fp8, which stay as they are. `--model_path`
        output: directory to write; must not exist, or be empty. `--save_directory`
        scheme: of KV cache and attention: a `Scheme`, the name of a preset, a `kv_cache_dtype` of vLLM, or a JSON file;
            "float" leaves them in float. `--scheme`, `--kv_cache_dtype`, `--use_kvcache_quant`, `--use_fa_quant`
        linear: of the linear layers: a `LinearScheme`, or a name, as "w8a8", "w4a16" (groups of 64 input channels) or
            "fp8"; None or "float" leaves them in float. Unless given, "w8a8", or as a quantized checkpoint has them.
            `--quantization`, `--w_bit`, `--a_bit`, `--is_dynamic`, `--w_sym`, `--group_size`, `--scale_bits`,
            `--w_method`, `--act_method`
        architecture: folder under `models/`, or what stands in it; None: found by config.json's model_type.
            The script that is run
        cpu_activations: of W8A16 and W4A16 on the CPU: "int8" quantizes inputs per token and group of channels, as the
            weight has them, so that integers are multiplied; "float" leaves them in float. `--cpu_activations`
        anti_method: treatment of outliers: "" none, "m1" SmoothQuant, "m2" with an offset, "m3" AWQ, "m4" iterative,
            "m6" searched. `--anti_method`
        kv_scales: where static scales of K and V come from: "data" the calibration texts, "random" random tokens,
            "none" all are 1, "source" the checkpoint, which keeps them beside linears in codes. `--kv_scales`
        float_linears: names or globs of linears that stay in float; None: those that the architecture states for static
            int8. `--disable_names`
        float_head: whether lm_head stays in float; False quantizes it as the other linears; None: it does, unless
            `embeddings` say otherwise. `--disable_last_linear`
        embeddings: of the embedding and lm_head: "float", or "int8" in groups of 32 channels, stored once where they
            are tied. `--embeddings`
        float_outliers: so many linears, those with the worst outliers, stay in float. `--disable_level`
        float_costliest: so many linears or attentions, those that cost most, stay in float. `--fa_amp`
        mean_bits: of linears in int4, those that cost most for their size are in W8A16, as many as keep the mean of the
            bits of a weight, all counted, at most so large; None: none is. `--w_bits_mean`
        max_kl: write nothing if the mean KL(float || quantized) over the held-back texts is larger, in nats per token.
            `--max_kl`
        calibration: the texts, a sequence of them; or a file of texts, one per line, plain or JSON; None: a small text
            that comes with Octavo. `--calib_texts`, `--calib_file`
        target: engine on Ascend that is to read the directory, whose names are written, and for which what it cannot
            read is refused: "mindie", "vllm-ascend-0.23" or, from 0.25 on, "vllm-ascend"; None: MindIE's names, and
            nothing is refused. `--target`
        pdmix: label static W8A8 as W8A8_MIX, which engines run by token where they prefill, and in static scales where
            they decode apart. `--pdmix`
        device: where calibration runs: "cpu", "cuda" or "npu". `--device_type`
        tokenizer_arguments: what the tokenizer is loaded with besides. `--tokenizer_args`
        input_ids_name, attention_mask_name: what the tokenizer calls them. Flags of the same names
        trust_remote_code: run code that comes with the tokenizer. `--trust_remote_code`
        max_shard_gb: split the weights into files of at most this size, in GB of 1e9 bytes; None: one file.
            `--part_file_size`
        save_statistics: file to write the calibration statistics to, too. `--save_statistics`
        resume: go on with a conversion that was interrupted, if there is one. `--resume`
        format: of the output: "ascend", which Octavo's own classes load, or an engine's. `--format`
        requantize: decode the linears that the checkpoint holds in codes, and take it for a float one. `--requantize`

    Raises:
        OctavoError: a field holds what is none of its values, or fields do not go together; the message names it.
    """

    model: str | Path
    output: str | Path
    _: KW_ONLY
    scheme: Scheme | str | Path = "float"
    linear: LinearScheme | str | None = DEFAULT_LINEAR
    architecture: Architecture | str | None = None
    cpu_activations: str = CPU_ACTIVATIONS[0]
    anti_method: str = ""
    kv_scales: str = "data"
    float_linears: Sequence[str] | None = None
    float_head: bool | None = None
    embeddings: str = EMBEDDINGS[0]
    float_outliers: int = 0
    float_costliest: int = 0
    mean_bits: float | None = None
    max_kl: float | None = None
    calibration: Sequence[str] | str | Path | None = None
    target: str | None = None
    pdmix: bool = False
    device: str = "cpu"
    tokenizer_arguments: Mapping[str, Any] = field(default_factory=dict)
    input_ids_name: str = "input_ids"
    attention_mask_name: str = "attention_mask"
    trust_remote_code: bool = False
    max_shard_gb: float | None = None
    save_statistics: str | Path | None = None
    resume: bool = False
    format: str = OWN_FORMAT
    requantize: bool = False

    def __post_init__(self) -> None:
        for name, value in _normalized(self).items():
            object.__setattr__(self, name, value)
        _check_choices(self)
        _check_numbers(self)
        _check_linear(self)

    @property
    def linear_is_given(self) -> bool:
        """Whether `linear` was asked for, be it for what it is unless given."""
        return self.linear is not DEFAULT_LINEAR

    def decisive_fields(self) -> dict[str, Any]:
        """What the bytes of an output follow from, as plain data, but for the model, its texts and the scheme.

        Those are known once they are read; a name or a path says little of them.
        """
        known = {part.name: getattr(self, part.name) for part in fields(self) if part.name not in NOT_DECISIVE}
        found = {name: None if value is None else repr(value) for name, value in known.items()}
        found |= {name: "not given" if known[name] is None else "given" for name in ONLY_WHETHER}
        return found | ({"label": "float"} if self.linear is None else asdict(self.linear))


def linear_scheme_of(linear: LinearScheme | str | None) -> LinearScheme | None:
    """A scheme of linears from a name in `LINEAR_NAMES`, of letters of any size, or as it is; None for float.

    Raises:
        OctavoError: it is none, or there is no such name; the message lists those there are.
    """
    if linear is None or isinstance(linear, LinearScheme):
        return linear
    if not isinstance(linear, str):
        raise OctavoError(f"linear {linear!r}: is no LinearScheme and none of {', '.join(LINEAR_NAMES)}")
    if linear.lower() not in LINEAR_NAMES:
        raise OctavoError(f"linear {linear}: is none of {', '.join(LINEAR_NAMES)}")
    label = LINEAR_NAMES[linear.lower()]
    return None if label is None else LinearScheme(label, group_size=DEFAULT_GROUP.get(label, 0))


def _normalized(request: ConvertRequest) -> dict[str, Any]:
    """Fields that may be given in several ways, in one way each, so that equal requests are equal."""
    calibration, float_linears = request.calibration, request.float_linears
    if isinstance(calibration, str):
        calibration = Path(calibration)
    elif calibration is not None and not isinstance(calibration, Path):
        calibration = tuple(calibration)
    if isinstance(float_linears, str):
        float_linears = (float_linears,)
    statistics = request.save_statistics
    return {
        "model": str(request.model),
        "output": Path(request.output),
        "scheme": str(request.scheme) if isinstance(request.scheme, Path) else request.scheme,
        "linear": linear_scheme_of(request.linear),
        "float_linears": None if float_linears is None else tuple(float_linears),
        "calibration": calibration,
        "tokenizer_arguments": dict(request.tokenizer_arguments),
        "save_statistics": None if statistics is None else Path(statistics),
    }


_CHOICES = {
    "anti_method": ANTI_METHODS, "kv_scales": KV_SCALES, "device": DEVICES, "cpu_activations": CPU_ACTIVATIONS,
    "embeddings": EMBEDDINGS,
}  # fmt: skip


def _check_choices(request: ConvertRequest) -> None:
    if request.anti_method == "m5":
        raise OctavoError(f"anti_method: {NO_M5}")
    for name, choices in _CHOICES.items():
        if getattr(request, name) not in choices:
            listed = ", ".join(choice or '""' for choice in choices)
            raise OctavoError(f"{name} {getattr(request, name)}: is none of {listed}")
    for name in ("float_head", "trust_remote_code", "resume", "requantize", "pdmix"):
        value = getattr(request, name)
        if not isinstance(value, bool) and not (name == "float_head" and value is None):
            raise OctavoError(f"{name} {getattr(request, name)!r}: is neither True nor False")
    if request.target not in (None, *TARGETS):
        raise OctavoError(f"target {request.target}: is none of {', '.join(TARGETS)}")
    if request.target is not None and request.format != OWN_FORMAT:
        raise OctavoError(
            f"target {request.target}: is of the format {OWN_FORMAT}, not {request.format}; leave one out"
        )
    if request.calibration == ():
        raise OctavoError("calibration: holds no text; give some, or None for the small text that comes with Octavo")


def _check_numbers(request: ConvertRequest) -> None:
    for name in ("max_kl", "max_shard_gb", "mean_bits"):
        value = getattr(request, name)
        if value is not None and not (isinstance(value, (int, float)) and value > 0):
            raise OctavoError(f"{name} {value}: is no positive number")
    if request.max_shard_gb == math.inf:
        raise OctavoError("max_shard_gb inf: is no size; give None for one file")
    for name in ("float_outliers", "float_costliest"):
        value = getattr(request, name)
        if not (isinstance(value, int) and value >= 0):
            raise OctavoError(f"{name} {value}: is no number of layers")


def check_activations(request: ConvertRequest, linear: LinearScheme, field: str) -> None:
    """Raise an `OctavoError` that names `cpu_activations` as `field` if it is given and means nothing."""
    counts = linear.label in WEIGHT_ONLY or request.embeddings == "int8"
    if not counts and request.cpu_activations != FOR_LINEARS["cpu_activations"]:
        raise OctavoError(f"{field}: {linear.label} quantizes inputs on every device; leave it out")


def _check_mean_bits(request: ConvertRequest) -> None:
    kind = "float" if request.linear is None else request.linear.label
    if kind not in (W4A16, W4A16_DOUBLE):
        raise OctavoError(f"mean_bits {request.mean_bits}: is of linears in int4 ({W4A16}, {W4A16_DOUBLE}), not {kind}")
    if request.format not in (OWN_FORMAT, "gguf") or request.target is not None:
        reader = request.target or request.format
        raise OctavoError(
            f"mean_bits {request.mean_bits}: {reader} does not read linears of 4 and of 8 bits; leave it out"
        )


def _check_linear(request: ConvertRequest) -> None:
    linear, has_float_inputs = request.linear, request.embeddings == "int8"
    if has_float_inputs and request.float_head is not None:
        given = f"float_head={request.float_head}"
        raise OctavoError(f"embeddings int8 and {given} exclude each other: both say what lm_head is")
    if request.mean_bits is not None:
        _check_mean_bits(request)
    if linear is None:
        for name, unless_given in FOR_LINEARS.items():
            is_given = getattr(request, name) not in (None, unless_given)
            if is_given and not (name == "cpu_activations" and has_float_inputs):
                raise OctavoError(f"{name}: linear=None leaves every linear in float")
        return
    if request.linear_is_given:
        check_activations(request, linear, "cpu_activations")
    if not linear.is_static and linear.act_method != "minmax":
        raise OctavoError(f"linear: {linear.label} has no static ranges of inputs; leave out act_method")
