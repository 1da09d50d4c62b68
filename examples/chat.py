"""Chat with a converted checkpoint. It needs nothing of Octavo installed: the code lies beside the weights.

python examples/chat.py --model_path DIR
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer


def ask() -> str:
    """The next message; an empty one at the end of input."""
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


def main() -> None:
    """Read a message, stream the answer, until an empty line, the end of input (Ctrl-D), or Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="directory that the conversion script wrote")
    flags = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(flags.model_path)
    model = AutoModelForCausalLM.from_pretrained(flags.model_path, trust_remote_code=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    messages = []
    while message := ask():
        messages.append({"role": "user", "content": message})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=200, streamer=streamer)
        answer = output[0, inputs["input_ids"].shape[1] :]
        messages.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print()
