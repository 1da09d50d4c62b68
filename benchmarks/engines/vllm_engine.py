"""The worker of vLLM on the CPU, in process."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from worker import serve, steps

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        }
    },
}  # fmt: skip
ROOM = 64
"""Tokens beside those that are asked for."""


def _set_environment(threads: int) -> None:
    """What vLLM reads when it is imported."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


class VllmEngine:
    """A directory of W8A8 in the form of compressed-tensors, in bfloat16 beside."""

    def prepare(self, source: str, into: str) -> None:
        """Quantize the linears: weights per channel, inputs per token."""
        import torch
        from safetensors.torch import load_file, save_file

        weights = {}
        for file in sorted(Path(source).glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                if name.endswith(".weight") and name.split(".")[-2] in LINEARS:
                    scale = (tensor.float().abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
                    weights[name] = (tensor.float() / scale).round().to(torch.int8)
                    weights[name + "_scale"] = scale.to(torch.bfloat16)
                else:
                    weights[name] = tensor.to(torch.bfloat16).contiguous()
        Path(into).mkdir(parents=True)
        for file in Path(source).glob("*"):
            if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json"):
                shutil.copy(file, into)
        save_file(weights, Path(into, "model.safetensors"), {"format": "pt"})
        config = json.loads(Path(source, "config.json").read_text(encoding="utf-8"))
        config |= {"quantization_config": W8A8, "dtype": "bfloat16"}
        Path(into, "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def load(self, directory: str, tokens: int, batch: int, threads: int, cache: str) -> str:
        """Load, and say with what."""
        _set_environment(threads)
        import vllm

        self.vllm, self.batch = vllm, 0
        self.engine = vllm.LLM(
            directory,
            dtype="bfloat16",
            kv_cache_dtype=cache,
            enforce_eager=True,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=tokens + ROOM,
            max_num_seqs=batch,
            max_num_batched_tokens=max(tokens + ROOM, 2048),
        ).llm_engine
        return f"vllm {vllm.__version__}"

    def measure(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Time the engine's steps, greedy; the first token is there when every sequence has one."""
        sampling = self.vllm.SamplingParams(max_tokens=new + 1, temperature=0.0, ignore_eos=True, detokenize=False)
        began, times = time.perf_counter(), []
        waiting = set()
        for ids in prompts:
            self.batch += 1
            waiting.add(str(self.batch))
            self.engine.add_request(str(self.batch), self.vllm.TokensPrompt(prompt_token_ids=ids), sampling)
        while self.engine.has_unfinished_requests():
            waiting -= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}
            if not waiting:
                times.append(time.perf_counter())
        return {"first": times[0] - began, "steps": steps(times)}

    def logits(self, **_: Any) -> None:
        """Not to be had.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("vLLM gives the likeliest tokens' probabilities alone")


if __name__ == "__main__":
    serve(VllmEngine())
