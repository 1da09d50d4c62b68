"""Runs in vLLM's environment: what it answers for some directories, each a job, in files of tensors.

A job is `{"directory", "dtype", "prompts", "new", "top", "watched", "options"}`, options being of the engine; its file
holds `tokens` `[P, new]`, greedy; `ids` and `logprobs` `[P, S - 1, top]`, float32, of the likeliest behind each token
of a prompt but the last, `step_ids` and `step_logprobs` `[P, new, top]` of those at each greedy one; and of the first
prompt, where the job says `watched`, `in.NAME`, `out.NAME` of linears and `NAME.q`, `.k`, `.v`, `.out` of attentions,
`[S, width]`.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0))),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def watch(model: Any, seen: dict[str, Any]) -> None:
    """Keep what linears and attentions are given and return, of their first call from now on."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import LinearBase

    def keep(name: str, tensor: Any) -> None:
        seen.setdefault(name, tensor.detach().clone().flatten(1))

    for name, module in model.named_modules():
        if isinstance(module, LinearBase):

            def linear(_: Any, inputs: Any, output: Any, name: str = name) -> None:
                keep(f"in.{name}", inputs[0])
                keep(f"out.{name}", output[0] if isinstance(output, tuple) else output)

            module.register_forward_hook(linear)
        elif isinstance(module, Attention):

            def attention(_: Any, inputs: Any, output: Any, name: str = name) -> None:
                for part, tensor in zip("qkv", inputs, strict=False):
                    keep(f"{name}.{part}", tensor)
                keep(f"{name}.out", output)

            module.register_forward_hook(attention)


def likeliest(name: str, found: Any, ends: list[int], top: int) -> dict[str, list[Any]]:
    """Ids and logprobs of places that end there, each of which begins with the token that stands there."""
    parts = {"ids": found.token_ids, "logprobs": found.logprobs}
    return {f"{name}{part}": [values[end - top : end] for end in ends] for part, values in parts.items()}


def answer(job: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The tensors of a job, and the dtype of the cache."""
    import torch
    import vllm

    engine = vllm.LLM(
        job["directory"],
        dtype=job["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=256,
        max_num_seqs=1,
        max_logprobs=job["top"],
        **job["options"],
    )
    seen: dict[str, Any] = {}
    if job["watched"]:
        engine.apply_model(lambda model: watch(model, seen))
    sampling = vllm.SamplingParams(
        max_tokens=job["new"],
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=job["top"],
        logprobs=job["top"],
        flat_logprobs=True,
    )
    answers: dict[str, list[Any]] = {}
    for ids in job["prompts"]:
        (output,) = engine.generate([vllm.TokensPrompt(prompt_token_ids=ids)], sampling, use_tqdm=False)
        steps, prompt = output.outputs[0].logprobs, output.prompt_logprobs
        found = {"tokens": list(output.outputs[0].token_ids)}
        # the first token of a prompt has none
        found |= likeliest("", prompt, prompt.end_indices[1:], job["top"])
        found |= likeliest("step_", steps, steps.end_indices, job["top"])
        for name, values in found.items():
            answers.setdefault(name, []).append(values)
    cache = engine.llm_engine.vllm_config.cache_config.cache_dtype
    return {name: torch.tensor(values) for name, values in answers.items()} | seen, cache


def main(jobs: str, folder: str) -> None:
    """Write the answers to the jobs in the file `jobs`, a list as JSON, into `folder`: 0.safetensors and so on."""
    os.environ |= SETTINGS
    from safetensors.torch import save_file
    from vllm import __version__
    from vllm.distributed import cleanup_dist_env_and_memory

    caches = []
    for index, job in enumerate(json.loads(Path(jobs).read_text())):
        tensors, cache = answer(job)
        save_file(tensors, Path(folder) / f"{index}.safetensors")
        caches.append(cache)
        gc.collect()
        cleanup_dist_env_and_memory()
    print("\n" + json.dumps({"caches": caches, "version": __version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
