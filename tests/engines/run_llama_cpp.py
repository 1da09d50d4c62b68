"""Runs in llama.cpp's environment: token ids of texts as JSON, and logits of a prompt into a file of numpy's."""

import json
import sys

import llama_cpp
import numpy as np

CACHE_TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 8}
"""Of ggml, by what `--cache-type-k` and `-v` call them."""


def main(file: str, texts: str, ids: str, into: str, cache: str) -> None:
    """Load a file; texts and ids are JSON."""
    given = json.loads(ids)
    model = llama_cpp.Llama(
        file,
        n_ctx=max(256, len(given)),
        n_batch=max(256, len(given)),
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        flash_attn=cache != "f16",
        type_k=CACHE_TYPES[cache],
        type_v=CACHE_TYPES[cache],
        verbose=False,
    )
    tokens = [model.tokenize(text.encode(), add_bos=False, special=False) for text in json.loads(texts)]
    model.eval(given)
    np.save(into, model.scores[: len(given)])
    print("\n" + json.dumps({"tokens": tokens, "version": llama_cpp.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
