"""Runs in vLLM's environment: its reference of NVFP4, of the values of a folder, `values.pt` `[S, D]`.

    python run_vllm_nvfp4.py FOLDER UNIT

UNIT is the scale of the tensor, of which vLLM takes the inverse. `found.pt` gets what the codes stand for, and the
scales of the blocks as they are stored, as float32.
"""

import sys

import torch
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    ref_nvfp4_quant,
    ref_nvfp4_quant_dequant,
)

BLOCK = 16


def main(folder: str, unit: str) -> None:
    """See the module."""
    values, inverse = torch.load(f"{folder}/values.pt"), torch.tensor([1 / float(unit)])
    _, scales = ref_nvfp4_quant(values, inverse, BLOCK)
    torch.save({"scales": scales, "values": ref_nvfp4_quant_dequant(values, inverse, BLOCK)}, f"{folder}/found.pt")
    print("\n{}")


if __name__ == "__main__":
    main(*sys.argv[1:])
