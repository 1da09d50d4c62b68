"""A project of your own with Octavo's two files copied in: a float Llama checkpoint with a quantized KV cache.

python main.py --model_path DIR_OR_HUB_ID
"""

import argparse
import json
from pathlib import Path

from my_model.modeling_llama_fa3 import LlamaForCausalLM
from transformers import AutoConfig, AutoTokenizer


def main() -> None:
    """Load as settings.json says, and generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="an ordinary Llama checkpoint, or a converted one")
    flags = parser.parse_args()
    settings = json.loads((Path(__file__).parent / "settings.json").read_text(encoding="utf-8"))

    config = AutoConfig.from_pretrained(flags.model_path)
    if not hasattr(config, "octavo"):  # a converted checkpoint names its own scheme
        config.octavo = {"scheme": settings["scheme"]}
    model = LlamaForCausalLM.from_pretrained(flags.model_path, config=config)
    tokenizer = AutoTokenizer.from_pretrained(flags.model_path)

    inputs = tokenizer(settings["prompt"], return_tensors="pt")
    cache = model.new_cache()
    output = model.generate(
        **inputs,
        cache=cache,  # before transformers 5.24: past_key_values=cache
        max_new_tokens=settings["max_new_tokens"],
        do_sample=False,
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(f"scheme {model.scheme.name}, KV cache {cache.used_nbytes():,} bytes")


if __name__ == "__main__":
    main()
