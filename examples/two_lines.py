"""A stock model of transformers with a quantized KV cache: two lines, no conversion.

python examples/two_lines.py --model_path DIR_OR_HUB_ID

Before transformers 5.24 the argument `cache` of `generate` is called `past_key_values`.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo import PRESETS, QuantizedCache, kept_kv_bytes, load_scheme, prepare


def main() -> None:
    """Generate with a quantized cache and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--prompt", default="The capital of France is")
    dynamic = [name for name in PRESETS if not load_scheme(name).is_static]
    parser.add_argument("--scheme", default="int8-token", choices=dynamic, help="one that needs no calibration")
    flags = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(flags.model_path)
    model = AutoModelForCausalLM.from_pretrained(flags.model_path)
    inputs = tokenizer(flags.prompt, return_tensors="pt")

    prepare(model)
    cache = QuantizedCache(model.config, scheme=flags.scheme)

    output = model.generate(**inputs, cache=cache, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    used = kept_kv_bytes(model.config, cache.scheme, cache.get_seq_length(), model.dtype.itemsize)
    print(
        f"KV cache of {cache.get_seq_length()} tokens: {used:,} bytes if all were codes, {cache.nbytes():,} allocated"
    )


if __name__ == "__main__":
    main()
