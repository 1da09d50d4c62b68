"""msmodelslim's own quantizer and its newer saver, run on the CPU, in a process of their own.

    python run_msmodelslim.py SOURCE DTYPE CASES SAVED FOLDER

CASES is JSON: by the name of a case arguments of `QuantConfig`, with "kv_quant" or "fa_quant" for the method of that
name. Of the checkpoint SOURCE the quantizer writes FOLDER/theirs/CASE, in the format that it calls ascendV1. SAVED is
JSON: by the name of a case a function of the saver, which makes FOLDER/saved/CASE of FOLDER/ours/CASE.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from msmodelslim import logger
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.fa_quant import FAQuantizer
from msmodelslim_saver import save
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def _observed(model: Any) -> None:
    """Attention that shows q `[B, H, S, D]`, k and v `[B, G, S, D]` to its quantizer, as edited modeling files do."""

    def forward(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        states = zip((query, key, value), "qkv", strict=True)
        observed = [module.fa_quantizer.quant(each, qkv=name) for each, name in states]
        return sdpa_attention_forward(module, *observed, *args, **kwargs)

    AttentionInterface.register("observed", forward)
    model.set_attn_implementation("observed")
    for layer in model.model.layers:
        layer.self_attn.fa_quantizer = FAQuantizer(model.config, logger)


def quantize(source: str, dtype: str, case: dict[str, Any], out: Path) -> None:
    """Quantize a checkpoint in one way."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, 24))
    texts = [[ids, torch.ones_like(ids)]]
    kv, fa = (case.pop(name, None) for name in ("kv_quant", "fa_quant"))
    config = QuantConfig(dev_type="cpu", pr=1.0, mm_tensor=False, disable_names=["lm_head"], **case)
    if kv:
        config.kv_quant()
    if fa:
        _observed(model)
        config.fa_quant(fa_amp=0)
    calibrator = Calibrator(model, config, calib_data=texts, disable_level="L0")
    calibrator.run()
    calibrator.save(str(out), save_type=["ascendV1"])


def main(source: str, dtype: str, cases: str, saved: str, folder: str) -> None:
    """See the module."""
    for name, case in json.loads(cases).items():
        quantize(source, dtype, case, Path(folder, "theirs", name))
    Path(folder, "saved").mkdir()
    for name, kind in json.loads(saved).items():
        save(Path(folder, "ours", name), kind, Path(folder, "saved", name))


if __name__ == "__main__":
    main(*sys.argv[1:])
