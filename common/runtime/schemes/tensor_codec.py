"""How one tensor is coded: the type of its codes, and which values share a scale."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ....ops.shared.codes import code_range
from ...errors import OctavoError

CODE_DTYPES = {
    "int8": torch.int8,
    "int4": torch.uint8,
    "int3": torch.uint8,
    "int2": torch.uint8,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Types of codes, and the dtype of the tensors that hold them (`ops/shared/codes.py`)."""
CODE_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "fp8_e4m3": 8, "fp8_e5m2": 8}
INTEGERS = ("int2", "int3", "int4", "int8")
"""Those of integers, the narrowest first."""
SCALE_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "e8m0": torch.uint8,
}
"""Types of dynamic scales, and the dtype of the tensors that hold them (`cache/scale_formats.py`)."""
SHORT_SCALES = ("fp8_e4m3", "e8m0")
"""Those that the ops do not know, which read such scales and zeros as float32."""
GRANULARITIES = ("channel", "head", "tensor", "token")
RULES = ("range", "full_range", "ocp", "mse", "norm", "llamacpp")
LEVELS = ("uniform", "gaussian", "e2m1", "calibrated")
OUTLIER_BITS = 16 + 8
"""An outlier is a float16 and the number of its channel."""
MOST_NUMBER = 2**24
"""Largest number of a scheme, of tokens or channels or a fixed scale."""
MOST_CHANNELS = 256
"""Channels of a head that such a number of 8 bits tells apart."""


def check_types(what: str, instance: Any) -> None:
    """Raise an `OctavoError` if a number, flag or text of a dataclass, as its default is, is of another type."""
    for part in dataclasses.fields(instance):
        value, kind = getattr(instance, part.name), type(part.default)
        if kind in (bool, int, float, str) and type(value) not in ((int, float) if kind is float else (kind,)):
            raise OctavoError(f"{what}: {part.name} {value!r} is no {kind.__name__}")
        if kind in (int, float) and not abs(value) <= MOST_NUMBER:
            raise OctavoError(f"{what}: {part.name} {value!r} is beyond all reason")


@dataclass(frozen=True)
class Codec:
    """How one tensor of shape `[B, G, S, D]` is coded.

    Attributes:
        dtype: type of the codes: "int8", "int4", "int3", "int2", "fp8_e4m3" or "fp8_e5m2".
        granularity: what shares one scale: "tensor", "head", "channel" (a channel of a head), or "token" (of a head).
        dynamic: scales come from the values themselves, per token, or per channel in groups of tokens; otherwise they
            are static, from calibration.
        symmetric: zero is 0; otherwise each scale has a zero point beside it (integers only).
        group_size: of granularity "token", the channels that share a scale, 0 for all of a head; of dynamic "channel",
            the tokens that do.
        scale_dtype: what dynamic scales and zeros are stored in, "float32", "float16" or "fp8_e4m3" (NVFP4; a zero as
            its distance from `middle`); or scales without zeros in "e8m0", the next power of two (MX).
        rule: how a scale follows from the values: "range" takes in all of them, or with gaussian levels their
            standard deviation; "full_range" lets the smallest code, -128, stand for the largest |x| (static scales
            too); "ocp" is OCP's for scales in e8m0, 2^(floor(log2 max|x|) - floor(log2 largest code)), which clips the
            largest values now and then; "mse" looks near "range" for the least squared error; "norm" codes as "range"
            does and then takes the scale by which the codes have the norm of the values; "llamacpp" is ggml's for
            blocks of 32 (Q8_0, Q4_0, Q4_1).
        levels: "uniform"; "gaussian", the best levels of a normal distribution (Lloyd-Max), with scale and zero from
            the standard deviation and mean of a group; "e2m1", the values of a float of 4 bits, 0 to 6; "calibrated",
            a codebook per layer from calibration.
        residual_sign: one more bit a value, the sign of what its code leaves, times a second scale of the group: the
            root of the mean square of that.
        outliers: values per token and head that are kept in float16 beside the codes, those farthest out.
        before_rope: K is coded as it was before RoPE, which is applied where it is read.
        clip: of rule "range", the part of the range between the smallest and the largest value, about its middle, that
            codes take in; what lies outside gets the code of its end.
        fixed_scale: a static scale of this value, which needs no calibration; 0 for one from calibration. Dynamic
            scales in fp8_e4m3 are in units of it (the second scale of NVFP4, per tensor); 0 for units of 1.
        tile: tokens that are balanced together before they are coded: x = (code - zero) * scale * second, where the
            second scale is one per channel of the tile beside scales per token, and one per token beside scales per
            channel (`tile_scales.py`); 0 for no second scale.
        wide_share: of granularity "channel", the share of a head's channels whose codes are wider: in each group of
            tokens those largest on average (`wide_channels.py`).
        wide_dtype: the type of these wider codes, of two or four bits more than the others.
    """

    dtype: str = "int8"
    granularity: str = "channel"
    dynamic: bool = False
    symmetric: bool = True
    group_size: int = 0
    scale_dtype: str = "float32"
    rule: str = "range"
    levels: str = "uniform"
    residual_sign: bool = False
    outliers: int = 0
    before_rope: bool = False
    fixed_scale: float = 0.0
    tile: int = 0
    wide_share: float = 0.0
    wide_dtype: str = "int4"
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_types("codec", self)
        choices = {"dtype": CODE_DTYPES, "granularity": GRANULARITIES, "scale_dtype": SCALE_DTYPES, "rule": RULES,
                   "levels": LEVELS, "wide_dtype": CODE_DTYPES}  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise OctavoError(f"codec: {name} {getattr(self, name)!r} is none of {', '.join(known)}")
        for is_wrong, message in self._contradictions():
            if is_wrong:
                raise OctavoError(f"codec: {message}")

    def _contradictions(self) -> list[tuple[bool, str]]:
        """What fields exclude each other, and how to say so."""
        is_fp8, is_token = self.dtype.startswith("fp8"), self.granularity == "token"
        has_levels = self.levels != "uniform"
        return [
            (is_token and not self.dynamic, "scales per token are dynamic; set 'dynamic'"),
            (self.dynamic and self.granularity in ("head", "tensor"), "scales per head or tensor are static"),
            (self.group_size < 0 or bool(self.group_size and not self.dynamic), "'group_size' is of dynamic scales"),
            (self.dynamic and self.granularity == "channel" and self.group_size < 2,
             "dynamic scales per channel serve groups of tokens; set 'group_size'"),
            (is_fp8 and not self.symmetric, "fp8 has no zero points; leave 'symmetric' at true"),
            (self.rule not in ("range", "full_range") and not self.dynamic, "'rule' is of dynamic scales"),
            (self.rule not in ("range", "ocp") and is_fp8, "'rule' is of scales of integers"),
            (self.rule == "ocp" and (self.scale_dtype != "e8m0" or self.levels == "gaussian"),
             "'rule' ocp is of scales in e8m0, and of no gaussian levels"),
            (self.rule == "full_range" and (has_levels or not self.symmetric),
             "'rule' full_range is of symmetric uniform levels"),
            (self.rule == "llamacpp" and not (is_token and self.group_size and self.dtype in ("int8", "int4")),
             "'rule' llamacpp is of int8 and int4 per token in groups of channels"),
            (has_levels and self.bits > 4, "'levels' are of 4 bits and fewer"),
            (self.levels == "e2m1" and (self.bits != 4 or not self.symmetric or not self.dynamic),
             "'levels' e2m1 are of int4, symmetric, with dynamic scales"),
            (self.levels == "calibrated" and self.rule != "range", "'rule' mse is of levels uniform and gaussian"),
            (has_levels and self.rule == "llamacpp", "'rule' llamacpp is of uniform levels"),
            (self.rule == "norm" and not (self.levels == "gaussian" and self.symmetric),
             "'rule' norm is of symmetric gaussian levels"),
            (self.levels == "gaussian" and not self.dynamic, "'levels' gaussian is of dynamic scales"),
            (self.levels == "calibrated" and self.symmetric, "'levels' calibrated has zeros; set 'symmetric' to false"),
            (self.scale_dtype == "e8m0" and not (self.dynamic and self.symmetric),
             "'scale_dtype' e8m0 is of dynamic symmetric codecs"),
            (self.scale_dtype == "fp8_e4m3" and not self.dynamic, "'scale_dtype' fp8_e4m3 is of dynamic codecs"),
            (self.scale_dtype == "fp8_e4m3" and self.has_zero and self.bits > 4,
             "'scale_dtype' fp8_e4m3 has zeros for codes of 4 bits and fewer; more are finer than it"),
            (self.rule in ("mse", "norm") and self.scale_dtype == "e8m0",
             "'rule' mse and norm choose among scales, of which e8m0 has powers of two alone"),
            (self.rule == "llamacpp" and self.scale_dtype in SHORT_SCALES, "'rule' llamacpp is of scales in floats"),
            (self.residual_sign and not (is_token and self.rule != "llamacpp"),
             "'residual_sign' is of scales per token, by other rules than llamacpp"),
            (self.outliers < 0 or bool(self.outliers and self.token_group > 1),
             "'outliers' is a number per token, which groups of tokens exclude"),
            (not 0 < self.clip <= 1, "'clip' is a part of the range, above 0 and up to 1"),
            (self.clip != 1 and (not self.dynamic or self.rule != "range" or has_levels or is_fp8),
             "'clip' is of dynamic scales of integers by rule range, in uniform levels"),
            (self.fixed_scale < 0 or bool(self.fixed_scale and not self._takes_fixed_scale),
             "'fixed_scale' is of static symmetric codecs, and of dynamic scales in fp8_e4m3"),
            *self._contradictions_of_groups(),
        ]  # fmt: skip

    def _contradictions_of_groups(self) -> list[tuple[bool, str]]:
        """Those of what only groups of tokens have."""
        is_grouped, is_mixed = self.dynamic and self.granularity == "channel", bool(self.wide_share)
        bits = CODE_BITS[self.wide_dtype]
        return [
            (self.tile < 0 or self.tile == 1 or bool(self.tile and not self.dynamic),
             "'tile' is a number of tokens that have dynamic scales, 0 for none"),
            (bool(self.tile) and is_grouped and self.tile != self.group_size,
             "a 'tile' of scales per channel is a group of their tokens; set 'group_size' to it"),
            (bool(self.tile) and self.rule == "llamacpp", "'rule' llamacpp has no second scales; leave 'tile' out"),
            (not 0 <= self.wide_share < 1 or (is_mixed and not is_grouped),
             "'wide_share' is a part of the channels of dynamic scales per channel, 0 for none"),
            (is_mixed and not (self.stored_dtype == torch.uint8 and bits - self.bits in (2, 4)
                               and self.wide_dtype.startswith("int")),
             "'wide_dtype' has 2 or 4 bits more than 'dtype': int4 beside int2, int8 beside int4"),
            (is_mixed and (self.group_size % 4 != 0 or self.rule == "norm" or self.levels == "calibrated"
                           or (self.levels != "uniform" and bits > 4)),
             "'wide_share' is of groups of a multiple of 4 tokens, rules range and mse, levels of 4 bits and fewer"),
            ((is_mixed or bool(self.tile)) and self.scale_dtype in SHORT_SCALES,
             "'tile' and 'wide_share' are of scales in float16 and float32"),
        ]  # fmt: skip

    @property
    def _takes_fixed_scale(self) -> bool:
        if self.dynamic:
            return self.scale_dtype == "fp8_e4m3"
        return self.symmetric and self.levels == "uniform"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return CODE_BITS[self.dtype]

    @property
    def ends(self) -> tuple[float, float]:
        """What the smallest and largest code stand for before scale and zero: -1 and 1 with a calibrated codebook."""
        own = {"calibrated": 1.0, "e2m1": 6.0}.get(self.levels)
        return code_range(self.stored_dtype, self.bits) if own is None else (-own, own)

    @property
    def middle(self) -> float:
        """What lies as far from the smallest as from the largest code: 0 of a codebook, which is symmetric."""
        return 0.0 if self.levels != "uniform" else sum(self.ends) / 2

    @property
    def most(self) -> float:
        """What the largest |x| becomes before a scale without a zero."""
        first, last = self.ends
        return -first if self.rule == "full_range" else last

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the tensor that holds the codes."""
        return CODE_DTYPES[self.dtype]

    @property
    def stored_scale_dtype(self) -> torch.dtype:
        """The dtype of dynamic scales and zeros."""
        return SCALE_DTYPES[self.scale_dtype]

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs statistics of a calibration."""
        return self.levels == "calibrated" or not (self.dynamic or self.fixed_scale)

    @property
    def has_zero(self) -> bool:
        """Whether dynamic scales have zero points beside them."""
        return not self.symmetric

    @property
    def is_native(self) -> bool:
        """Whether the attention op reads the codes as they are; others are decoded block by block."""
        return self.bits >= 4 and self.levels == "uniform" and self.is_whole

    def is_native_on(self, device: str) -> bool:
        """Whether the attention op of a type of device does: that of the CPU reads fewer bits and codebooks as well."""
        return self.is_native or (device == "cpu" and self.is_whole)

    @property
    def is_whole(self) -> bool:
        """Whether `(code - zero) * scale` is all there is to a value of K or V."""
        return not (self.outliers or self.before_rope or self.residual_sign or self.tile or self.wide_share)

    @property
    def is_one_op(self) -> bool:
        """Whether one op makes codes, and scales where they are dynamic: `encode` or `encode_token`."""
        is_plain = self.rule == "range" and self.clip == 1 and self.scale_dtype not in SHORT_SCALES
        is_dynamic_op = is_plain and self.token_group == 1
        return self.is_native and (is_dynamic_op or not self.dynamic)

    @property
    def scale_group(self) -> int:
        """Consecutive tokens that share a dynamic scale."""
        return self.group_size if self.dynamic and self.granularity == "channel" else 1

    @property
    def token_group(self) -> int:
        """Consecutive tokens that become codes together."""
        return self.tile or self.scale_group

    @cached_property
    def wide(self) -> "Codec":
        """The codec of the channels whose codes are wider."""
        return dataclasses.replace(self, dtype=self.wide_dtype, wide_share=0.0, tile=0)

    def widened(self, dtype: str) -> "Codec":
        """The same with codes of more bits; those of int8 go by the whole range, finer than scales in a byte allow."""
        fields: dict[str, Any] = {"dtype": dtype}
        if dtype == "int8":
            fields |= {"levels": "uniform", "rule": "range", "clip": 1.0}
            if self.scale_dtype == "fp8_e4m3":
                fields |= {"scale_dtype": "float16", "fixed_scale": 0.0}
        return dataclasses.replace(self, **fields)

    @property
    def wide_bits(self) -> int:
        """Bits that their codes have more than the others."""
        return CODE_BITS[self.wide_dtype] - self.bits

    def wide_channels(self, head_dim: int) -> int:
        """How many of `head_dim` channels have wider codes, at least one where any have.

        Raises:
            OctavoError: these are more than numbers of 8 bits tell apart.
        """
        if self.wide_share and head_dim > MOST_CHANNELS:
            raise OctavoError(f"codec: 'wide_share' is of heads of up to {MOST_CHANNELS} channels, not {head_dim}")
        return max(1, int(self.wide_share * head_dim + 1e-6)) if self.wide_share else 0

    def second_scales(self, head_dim: int) -> tuple[int, int]:
        """Tokens that share second scales, and how many these are; none without a tile."""
        if not self.tile:
            return 1, 0
        return (1, 1) if self.granularity == "channel" else (self.tile, head_dim)

    def stored_width(self, head_dim: int) -> int:
        """Columns of the tensor that holds codes of `head_dim` channels.

        Raises:
            OctavoError: so many channels do not fill whole bytes, or are too few or too many for the outliers.
        """
        if self.outliers and not self.outliers < head_dim <= MOST_CHANNELS:
            raise OctavoError(
                f"codec: {self.outliers} outliers are of heads of more channels, up to 256, not {head_dim}"
            )
        fraction = 8 if self.residual_sign else {4: 2, 3: 8, 2: 4}.get(self.bits, 1)
        if head_dim % fraction:
            raise OctavoError(f"codec: {self.dtype} needs heads of a multiple of {fraction} channels, not {head_dim}")
        return head_dim * self.bits // 8

    def channel_groups(self, head_dim: int) -> int:
        """Dynamic scales of one token, or group of tokens, and head of `head_dim` channels.

        Raises:
            OctavoError: the group size does not divide the head.
        """
        if self.granularity == "channel":
            return head_dim
        if self.group_size and head_dim % self.group_size:
            raise OctavoError(f"codec: groups of {self.group_size} channels do not divide a head of {head_dim}")
        return head_dim // self.group_size if self.group_size else 1

    def token_bits(self, head_dim: int) -> float:
        """Bits of one token of one head of `head_dim` channels, with all that belongs to them.

        That is dynamic scales and zeros, second scales, signs, outliers, wider codes and numbers of channels.
        """
        total = float((self.bits + self.residual_sign) * head_dim + OUTLIER_BITS * self.outliers)
        each = 8 * self.stored_scale_dtype.itemsize
        if self.dynamic:
            total += each * (1 + self.has_zero + self.residual_sign) * self.channel_groups(head_dim) / self.scale_group
        tokens, seconds = self.second_scales(head_dim)
        return total + each * seconds / tokens + self.wide_channels(head_dim) * (self.wide_bits + 8 / self.scale_group)

    def constant_bits(self, heads: int, head_dim: int) -> int:
        """Bits of a layer that do not grow with the tokens: static scales and zeros, and a codebook, in float32."""
        shared = {"tensor": 1, "head": heads, "channel": heads * head_dim, "token": 0}[self.granularity]
        scales = 0 if self.dynamic or self.fixed_scale else shared * (1 + self.has_zero)
        return 32 * (scales + (2**self.bits if self.levels == "calibrated" else 0))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; defaults, but for type and granularity, left out."""
        fields = {part.name: part.default for part in dataclasses.fields(self)}
        own = dataclasses.asdict(self)
        return {k: v for k, v in own.items() if k in ("dtype", "granularity") or v != fields[k]}
