"""How linear layers are quantized, as flags say it in several ways."""

import argparse

from ..errors import OctavoError
from ..runtime.schemes.linear_scheme import W4A16, W4A16_DOUBLE, W8A8, W8A8_DYNAMIC, W8A16, WEIGHT_ONLY, LinearScheme
from .flag_values import ACT_METHOD_NAMES
from .request import DEFAULT_GROUP, DEFAULT_LINEAR, LINEAR_NAMES, OWN_FORMAT

BITS = {(8, 16): W8A16, (4, 16): W4A16, (16, 16): None}
"""Label by `--w_bit` and `--a_bit`; 8 and 8 depend on `--is_dynamic`."""
FOR_LINEARS = {
    "disable_names": None, "disable_level": 0, "is_dynamic": False, "anti_method": "", "group_size": None,
    "w_method": "MinMax", "w_sym": True, "act_method": "1", "disable_last_linear": True, "cpu_activations": "int8",
    "scale_bits": None,
}  # fmt: skip
"""Flags that mean nothing where every linear stays in float, and what they are unless given."""

HOLD_SCALE_BITS = (OWN_FORMAT, "gguf")
"""Formats that hold scales of 8 bits, or what they stand for: for others, and for engines on Ascend, a preset's are in
float unless `--scale_bits` is given."""
LINEAR_FLAGS = {
    "w_bit", "a_bit", "quantization", "is_dynamic", "w_sym", "group_size", "scale_bits", "w_method", "act_method",
}  # fmt: skip
"""Flags that say how linears are quantized."""


def linear_scheme_of_flags(flags: argparse.Namespace, is_given: bool = True) -> LinearScheme | None:
    """How linear layers are quantized, from the flags; None leaves them in float.

    Args:
        is_given: whether any of `LINEAR_FLAGS` is; `DEFAULT_LINEAR` follows if none is.

    Raises:
        OctavoError: flags that do not go together.
    """
    if flags.embeddings == "int8" and flags.disable_last_linear is not None:
        given = f"--disable_last_linear {flags.disable_last_linear}"
        raise OctavoError(f"--embeddings int8 and {given} exclude each other: both say what lm_head is")
    if flags.quantization and (flags.is_dynamic or (flags.w_bit, flags.a_bit) != (8, 8)):
        raise OctavoError("--quantization, and --w_bit, --a_bit or --is_dynamic exclude each other: choose one way")
    if not is_given:
        return DEFAULT_LINEAR
    label = LINEAR_NAMES[flags.quantization] if flags.quantization else _label_of_bits(flags)
    if label is None:
        for flag, unless_given in FOR_LINEARS.items():
            is_meant = getattr(flags, flag) not in (None, unless_given)
            if is_meant and not (flag == "cpu_activations" and flags.embeddings == "int8"):
                raise OctavoError(f"--{flag}: --w_bit 16 leaves every linear in float")
        return None
    if label not in WEIGHT_ONLY and (flags.group_size or not flags.w_sym):
        given = f"--group_size {flags.group_size}" if flags.group_size else "--w_sym False"
        raise OctavoError(
            f"{given}: {label} has symmetric weights with a scale per output channel; W8A16 (--a_bit 16) and W4A16 "
            "(--w_bit 4 --a_bit 16) take groups and zero points"
        )
    if (
        label not in WEIGHT_ONLY
        and flags.embeddings == "float"
        and flags.cpu_activations != FOR_LINEARS["cpu_activations"]
    ):
        raise OctavoError(f"--cpu_activations: {label} quantizes inputs on every device; leave it out")
    label = _label_of_scales(flags, label)
    usual = (flags.recipe_group or DEFAULT_GROUP.get(label, 0)) if label in WEIGHT_ONLY else 0
    scheme = LinearScheme(
        label,
        group_size=usual if flags.group_size is None else flags.group_size,
        symmetric=flags.w_sym and (flags.recipe_sym or label not in WEIGHT_ONLY),
        w_method=flags.w_method,
        act_method=ACT_METHOD_NAMES[flags.act_method],
    )
    if not scheme.is_static and flags.act_method != "1":
        raise OctavoError(
            f"--act_method {flags.act_method}: {label} (--is_dynamic, --quantization) has no static ranges of inputs"
        )
    return scheme


def _label_of_scales(flags: argparse.Namespace, label: str) -> str:
    """The label of linears whose scales are in the bits that are asked for."""
    if flags.scale_bits is not None and label not in (W4A16, W4A16_DOUBLE):
        raise OctavoError(f"--scale_bits {flags.scale_bits}: is of W4A16 (--w_bit 4 --a_bit 16), not {label}")
    is_affine = not (flags.w_sym and flags.recipe_sym)
    is_held = is_affine and flags.format in HOLD_SCALE_BITS and flags.target is None
    is_held = is_held and flags.quantization is None
    bits = (flags.recipe_scale_bits if is_held else None) if flags.scale_bits is None else flags.scale_bits
    if label == W4A16 and bits == 8:
        return W4A16_DOUBLE
    if label == W4A16_DOUBLE and bits == 16:
        raise OctavoError(f"--scale_bits 16: {label} has scales in 8 bits; give --quantization w4a16, or leave it out")
    return label


def _label_of_bits(flags: argparse.Namespace) -> str | None:
    bits = flags.w_bit, flags.a_bit
    if bits == (8, 8):
        return W8A8_DYNAMIC if flags.is_dynamic else W8A8
    if bits not in BITS:
        of_engine = "; W4A8_DYNAMIC of vllm-ascend is 4 and 16 with --format vllm-ascend-w4a8" * (bits == (4, 8))
        raise OctavoError(
            f"--w_bit {bits[0]} --a_bit {bits[1]}: "
            f"choose 8 and 8 (W8A8), 8 and 16 (W8A16), 4 and 16 (W4A16), or 16 and 16 (float){of_engine}"
        )
    if flags.is_dynamic:
        raise OctavoError(f"--is_dynamic: inputs are quantized by --w_bit 8 --a_bit 8, not {bits[0]} and {bits[1]}")
    return BITS[bits]
