"""Runs in vLLM's environment: greedy tokens and the two likeliest of each step, as JSON; options are the engine's."""

import json
import os
import sys

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0))),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(directory: str, dtype: str, new: str, prompts: str, options: str = "{}") -> None:
    """Generate `new` tokens behind each of some prompts, lists of token ids as JSON; options are of the engine."""
    os.environ |= SETTINGS
    import vllm

    engine = vllm.LLM(
        directory,
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=256,
        max_num_seqs=8,
        **json.loads(options),
    )
    sampling = vllm.SamplingParams(max_tokens=int(new), temperature=0.0, ignore_eos=True, detokenize=False, logprobs=2)
    given = [vllm.TokensPrompt(prompt_token_ids=ids) for ids in json.loads(prompts)]
    outputs = [output.outputs[0] for output in engine.generate(given, sampling, use_tqdm=False)]
    found = [
        {
            "tokens": list(output.token_ids),
            "likeliest": [{k: v.logprob for k, v in step.items()} for step in output.logprobs],
        }
        for output in outputs
    ]
    cache = engine.llm_engine.vllm_config.cache_config.cache_dtype
    print("\n" + json.dumps({"outputs": found, "cache": cache, "version": vllm.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
