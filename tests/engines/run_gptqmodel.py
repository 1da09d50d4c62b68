"""Loads directories by transformers, with GPTQModel beside it: logits of tokens, and whose classes their linears are.

    python run_gptqmodel.py PACKAGES DIRECTORIES IDS OUT

PACKAGES is where GPTQModel was installed; DIRECTORIES and IDS are JSON. OUT gets logits `[B, S, vocabulary]`, float32,
by the place of each directory; what is printed last is JSON, for each the module of its linears' class and what was not
loaded.
"""

import json
import os
import sys

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # GPTQModel compiles, and the linker takes no directory with a space


def main(packages: str, directories: str, ids: str, out: str) -> None:
    """See the module."""
    sys.path.insert(0, packages)
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    logits, said = {}, []
    for index, directory in enumerate(json.loads(directories)):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, device_map="cpu", output_loading_info=True
        )
        problems = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
        said.append([type(model.model.layers[0].mlp.up_proj).__module__, problems])
        with torch.no_grad():
            logits[str(index)] = model(torch.tensor(json.loads(ids))).logits.float()
    save_file(logits, out)
    print("\n" + json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
