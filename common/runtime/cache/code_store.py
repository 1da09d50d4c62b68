"""Codes of K or of V of one layer: encoded once, handed out as views.

B batch, G KV heads, S tokens, D head_dim, W groups of channels that have a scale of their own.
"""

import copy

import torch

from ....ops import decode, encode, encode_token
from ....ops.shared.codes import LARGEST_ZERO, expand_scale, pack_indices, pack_signs, unpack_indices, unpack_signs
from ....ops.shared.registry import eagerly
from ..rotary import rotated_by_slot
from .code_storage import CodeStorage
from .dynamic_scales import group_scale, llamacpp_codes, residual_scale, scale_of_norm
from .scale_formats import as_floats, rounded_to_e2m1, zero_as_floats
from .tile_scales import second_scales
from .views import Codes
from .wide_channels import MixedCodes, decode_wide, encode_mixed


def split_outliers(
    values: torch.Tensor, distance: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take out the `count` values of each token and head that lie farthest out.

    Args:
        values: float32 `[B, G, S, D]`.
        distance: how far out each is, of the same shape.

    Returns:
        values with the mean of their token in those places; the outliers, float16 `[B, G, S, count]`; and their
        channels, uint8.
    """
    channels = distance.topk(count, dim=-1).indices
    outliers = values.gather(-1, channels)
    rest = (values.sum(dim=-1, keepdim=True) - outliers.sum(dim=-1, keepdim=True)) / (values.shape[-1] - count)
    return values.scatter(-1, channels, rest.expand_as(outliers)), outliers.half(), channels.to(torch.uint8)


class CodeStore(CodeStorage):
    """Codes in a `CodeStorage`: what encodes tokens into it, and what decodes them."""

    def append(self, values: torch.Tensor) -> Codes:
        """Encode new tokens `[B, G, S, D]`, S a multiple of the codec's token group, behind those that are stored.

        Returns:
            a handle to all that is stored then.
        """
        self.allocate(values, self.length + values.shape[2])
        start = self.length - self.forgotten
        stop = start + values.shape[2]
        codes, codec = self._codes[:, :, start:stop], self.codec
        if codec is None:
            codes.copy_(values)
        elif codec.dynamic and codec.is_one_op:
            scale, zero = self._of(self._scale, start, stop), self._of(self._zero, start, stop)
            eagerly(encode_token, values, codes, scale, zero)
        elif codec.is_one_op:
            eagerly(encode, values, self._static_scale, self._static_zero, codes)
        else:
            self._encode(values.float(), start, stop)
        self.length += values.shape[2]
        return self.codes()

    def _of(self, part: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
        """Rows of a scale or another part that belong to rows `start:stop` of codes, whole groups."""
        if part is None:
            return None
        group = self._codes.shape[2] // part.shape[2]
        return part[:, :, start // group : -(-stop // group)]

    def _slot(self, row: int) -> int:
        """The slot of a row of the storage."""
        return self.first_slot + self.forgotten + row

    def _encode(self, values: torch.Tensor, start: int, stop: int) -> None:
        """Encode `[B, G, S, D]` float32 in PyTorch's terms: what no fused op does in one."""
        codec = self.codec
        if codec.before_rope:
            values = rotated_by_slot(values, self._frequencies, self._slot(start), backwards=True)
        if codec.outliers:
            if codec.dynamic:
                distance = (values - values.mean(dim=-1, keepdim=True)).abs()
            else:
                distance = (values / self._static_scale + (0 if self._static_zero is None else self._static_zero)).abs()
            values, outliers, channels = split_outliers(values, distance, codec.outliers)
            self._of(self._outliers, start, stop).copy_(outliers)
            self._of(self._channels, start, stop).copy_(channels)
        codes = self._codes[:, :, start:stop]
        if codec.rule == "llamacpp":
            self._encode_llamacpp(values, start, stop)
            return
        if not codec.dynamic:
            encode(values, self._static_scale, self._static_zero, codes, bits=codec.bits, levels=self._levels)
            return
        if codec.tile:
            second = second_scales(codec, values)
            self._of(self._second, start, stop).copy_(second)
            values = values / self._by_token(second)
        group = codec.scale_group
        if group > 1:
            groups = values.unflatten(2, (-1, group)).transpose(-1, -2)  # [B, G, T, D, group]
        else:
            groups = values.unflatten(-1, (codec.channel_groups(values.shape[-1]), -1))  # [B, G, S, W, n]
        if codec.wide_share:
            self._encode_mixed(groups, start, stop)
            return
        scale, zero = group_scale(codec, groups)
        stored = scale_of_norm(codec, groups, scale) if codec.rule == "norm" else scale
        self._of(self._scale, start, stop).copy_(stored)
        if zero is not None:
            self._of(self._zero, start, stop).copy_(zero)
            zero = zero_as_floats(codec, zero).float()
        scale = as_floats(codec, scale).float()
        scale = scale.masked_fill(scale == 0, torch.inf)  # what is too small for a scale in e4m3 becomes 0
        if group > 1:  # groups of tokens take the place of heads, so that each has one scale for all of its tokens
            values = values.flatten(0, 1).unflatten(1, (-1, group))
            codes = codes.flatten(0, 1).unflatten(1, (-1, group))
            scale = scale.flatten(0, 1)[:, :, None]
            zero = None if zero is None else zero.flatten(0, 1)[:, :, None]
        rounded = values
        if codec.levels == "e2m1":  # whose ties are no business of an op
            rounded, scale = rounded_to_e2m1(values / expand_scale(scale, *values.shape[-2:])), scale.new_ones(1)
        encode(rounded, scale, zero, codes, bits=codec.bits, levels=self._levels)
        if codec.residual_sign:
            left = values - self._decoded_codes(start, stop)
            grouped = left.unflatten(-1, (self._residual.shape[-1], -1))
            self._of(self._residual, start, stop).copy_(residual_scale(codec, grouped))
            self._of(self._signs, start, stop).copy_(pack_signs(left >= 0))

    def _by_token(self, second: torch.Tensor) -> torch.Tensor:
        """Second scales as float32 for each token, `[B, G, S, 1 or D]`."""
        tokens, _ = self.codec.second_scales(second.shape[-1])
        return second.float().repeat_interleave(tokens, dim=2)

    def _encode_mixed(self, groups: torch.Tensor, start: int, stop: int) -> None:
        """Encode groups of tokens `[B, G, T, D, n]` in codes of two widths."""
        mixed = encode_mixed(self.codec, groups)
        indices = mixed.indices.mT.flatten(2, 3)
        self._codes[:, :, start:stop] = pack_indices(indices, self.codec.bits, indices.shape[-1])
        for name in ("wide", "channels", "scale", "zero"):
            part = getattr(self, f"_{name}")
            if part is not None:
                self._of(part, start, stop).copy_(getattr(mixed, name))

    def _with_wide(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Values `[B, G, S, D]` with those of wider codes in their places."""
        indices = unpack_indices(self._codes[:, :, start:stop], self.codec.bits, values.shape[-1])
        indices = indices.unflatten(2, (-1, self.codec.scale_group)).mT
        parts = (self._of(part, start, stop) for part in (self._wide, self._channels, self._scale, self._zero))
        channels, wider = decode_wide(self.codec, MixedCodes(indices, *parts))
        grouped = values.unflatten(2, (-1, self.codec.scale_group))
        return grouped.scatter(-1, channels.mT, wider.mT).flatten(2, 3)

    def _encode_llamacpp(self, values: torch.Tensor, start: int, stop: int) -> None:
        codec = self.codec
        groups = values.unflatten(-1, (codec.channel_groups(values.shape[-1]), -1))
        codes, scale, minimum = llamacpp_codes(groups, codec.bits, codec.has_zero)
        if codec.has_zero:  # x = d * (code + 8) + m; of a d of nearly 0 nothing is left beside m, so x = m * (-8 + 9)
            is_flat = minimum.float().abs() >= scale.float() * LARGEST_ZERO
            zero = torch.where(is_flat, -9.0, -8 - minimum.float() / scale.float())
            self._of(self._zero, start, stop).copy_(zero)
            codes = torch.where(is_flat[..., None], -8.0, codes)
            scale = torch.where(is_flat, minimum, scale)
        self._of(self._scale, start, stop).copy_(scale)
        one = torch.ones(1, device=values.device)
        encode(codes.flatten(-2), one, None, self._codes[:, :, start:stop])

    def write(self, values: torch.Tensor, position: torch.Tensor) -> None:
        """Encode new tokens `[B, G, S, D]` at `position`, int64 `[1]`, which stays on the device; storage is allocated.

        `length` does not count them. Without a codec they take the dtype of the storage, which does not move.
        """
        if self.codec is None:
            tokens = position + torch.arange(values.shape[2], device=values.device)
            self._codes.index_copy_(2, tokens, values.to(self._codes.dtype))
        elif self.codec.dynamic:
            eagerly(encode_token, values, self._codes, self._scale, self._zero, position)
        else:
            eagerly(encode, values, self._static_scale, self._static_zero, self._codes, position)

    def _decoded_codes(self, start: int, stop: int) -> torch.Tensor:
        """What `decode` makes of rows `start:stop` of codes, whole groups."""
        codec, codes = self.codec, self._codes[:, :, start:stop]
        scale, zero = self._scales_of(start, stop)
        return decode(codes, scale, zero, codec.scale_group, bits=codec.bits, levels=self._levels)

    def _scales_of(self, start: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scale and zero of rows `start:stop` of codes, as the ops take them: views, but of those in a byte."""
        if self._scale is None:
            return self._static_scale, self._static_zero
        scale, zero = self._of(self._scale, start, stop), self._of(self._zero, start, stop)
        return as_floats(self.codec, scale), None if zero is None else zero_as_floats(self.codec, zero)

    def decoded(self, start: int, stop: int) -> torch.Tensor:
        """The values that rows `start:stop` of codes, whole groups, stand for: float32 `[B, G, S, D]`."""
        codec = self.codec
        if codec is None:
            return self._codes[:, :, start:stop].float()
        values = self._decoded_codes(start, stop)
        if codec.wide_share:
            values = self._with_wide(values, start, stop)
        if codec.residual_sign:
            scale = as_floats(codec, self._of(self._residual, start, stop)).float()
            values += unpack_signs(self._of(self._signs, start, stop)) * expand_scale(scale, *values.shape[-2:])
        if codec.tile:
            values = values * self._by_token(self._of(self._second, start, stop))
        if codec.outliers:
            channels = self._of(self._channels, start, stop).long()
            values.scatter_(-1, channels, self._of(self._outliers, start, stop).float())
        if codec.before_rope:
            values = rotated_by_slot(values, self._frequencies, self._slot(start))
        return values

    def codes(self, length: torch.Tensor | None = None) -> Codes:
        """What is stored, as views: no copy but of scales and zeros in a byte, no code decoded.

        With `length`, int64 `[1]`, the whole storage.
        """
        rows = self.length - self.forgotten if length is None else self._codes.shape[2]
        scale, zero = self._scales_of(0, rows)
        decoder = None
        if self.codec is not None and not self.codec.is_native_on(self._codes.device.type):
            as_it_is = self if self.sliding is None else copy.copy(self)  # its storage may be another after this pass
            decoder = as_it_is.decoded
        codes = self._codes[:, :, :rows]
        bits = self.codec.bits if self.codec is not None and codes.dtype == torch.uint8 else 4
        return Codes(
            codes, scale, zero, length=length, group=self._group, first=self.forgotten, decoder=decoder, bits=bits,
            levels=None if self.codec is None else self._levels,
        )  # fmt: skip
