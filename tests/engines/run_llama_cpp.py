"""Runs in llama.cpp's environment: token ids of texts, and logits behind a prompt, as JSON."""

import json
import sys

import llama_cpp


def main(file: str, texts: str, ids: str) -> None:
    """Load a file; texts and ids are JSON."""
    model = llama_cpp.Llama(file, n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    tokens = [model.tokenize(text.encode(), add_bos=False, special=False) for text in json.loads(texts)]
    given = json.loads(ids)
    model.eval(given)
    logits = model.scores[: len(given)].tolist()
    print("\n" + json.dumps({"tokens": tokens, "logits": logits, "version": llama_cpp.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
