"""Weights in fp8, e4m3, with a scale per block, of 128 x 128 in DeepSeek's checkpoints: `w = code * scale`.

N output channels, K input channels. A linear is `weight`, float8_e4m3fn `[N, K]`, and `weight_scale_inv`, float32 or
bfloat16 `[ceil(N / rows), ceil(K / columns)]`, which is the scale itself, whatever its name says.
"""

import torch

METHOD = "fp8"
"""`quant_method` in config.json."""
PARTS = ("weight", "weight_scale_inv")


def block_scales(scales: torch.Tensor, rows: int, columns: int, shape: tuple[int, int]) -> torch.Tensor:
    """The scale of each weight, float32 `[N, K]`, of blocks of `rows` x `columns`."""
    spread = scales.float().repeat_interleave(rows, dim=0)[: shape[0]]
    return spread.repeat_interleave(columns, dim=1)[:, : shape[1]]


def decode_blocks(codes: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Weights, float32 `[N, K]`."""
    return codes.float() * block_scales(scales, rows, columns, tuple(codes.shape))
