"""Runs where onnxruntime-genai is: logits and codes of prompts into a file, and tokens behind them as JSON."""

import json
import sys

import numpy as np
import onnxruntime_genai as genai


def read(model: genai.Model, ids: list[int], new: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Logits of a prompt `[S, vocabulary]`, codes of K of layer 0 `[G, S, D]`, and `new` tokens behind it, greedy."""
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + new, min_length=len(ids) + new, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([ids], dtype=np.int32))
    logits, codes = (np.array(generator.get_output(name))[0] for name in ("logits", "present.0.key"))
    for _ in range(new):
        generator.generate_next_token()
    return logits, codes, generator.get_sequence(0)[len(ids) :].tolist()


def main(directory: str, prompts: str, new: str, into: str) -> None:
    """Prompts are lists of token ids, all as long, as JSON; logits and codes go into a file of numpy's."""
    model = genai.Model(directory)
    logits, codes, tokens = zip(*(read(model, ids, int(new)) for ids in json.loads(prompts)), strict=True)
    np.savez(into, logits=np.stack(logits), codes=np.stack(codes))
    print("\n" + json.dumps({"tokens": tokens, "version": genai.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
