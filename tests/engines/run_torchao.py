"""torchao's MX formats of a tensor of a folder, `values.pt`: exponents and what it stands for, in `found.pt`.

python run_torchao.py FOLDER mxfp8|mxfp4
"""

import sys

import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx

DTYPES = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the bits below the sign, in order. Source: OCP Microscaling Formats (MX) 1.0, table 5."""
BLOCK = 32


def codes_of(data: torch.Tensor) -> torch.Tensor:
    """What the codes of `to_mx` stand for before their scales; of e2m1 two lie in a byte, the first one below."""
    if data.dtype == torch.float8_e4m3fn:
        return data.float()
    packed = data.view(torch.uint8)
    bits = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).int()
    return torch.tensor(E2M1 + tuple(-value for value in E2M1))[bits]


def main(folder: str, name: str) -> None:
    """See the module."""
    values = torch.load(f"{folder}/values.pt")
    scale, data = to_mx(values, DTYPES[name], BLOCK, ScaleCalculationMode.FLOOR)[:2]
    exponents = scale.view(torch.uint8)
    blocks = codes_of(data).unflatten(-1, (-1, BLOCK)) * torch.exp2(exponents.float() - 127)[..., None]
    torch.save({"exponents": exponents, "values": blocks.flatten(-2)}, f"{folder}/found.pt")
    print("\n{}")


if __name__ == "__main__":
    main(*sys.argv[1:])
