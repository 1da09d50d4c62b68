"""What several test files share: a tiny Llama with a tokenizer, conversions of it, and processes without Octavo."""

import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).parents[1]

CACHE_NAME = next(
    name for name in ("cache", "past_key_values") if name in inspect.signature(LlamaForCausalLM.forward).parameters
)
"""What this version of transformers calls a cache, in arguments and in outputs: `cache` since 5.24."""

TEXTS = [
    "The lighthouse keeper wrote down the weather every morning, and the sea wrote back at night.",
    "Seven sheets of paper, folded once, make fourteen leaves; folded thrice, they make an octavo.",
    "Rain fell on the harbour for nine days, and on the tenth day nobody could find the harbour.",
    "A good map leaves out almost everything, which is why it fits into a pocket.",
    "Once there was a baker who measured flour by listening to it fall.",
    "The train was late, the tea was cold, and the book was better than either had promised.",
    "Every word in this sentence was chosen for no other reason than to be a token.",
    "When the bell rang the pupils left, and only the chalk remembered the lesson.",
]
"""Eight texts of 20 to 60 tokens: seven to calibrate on, one held back."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def tiny_config(**changes: Any) -> LlamaConfig:
    """Three layers, 4 query heads on 2 KV heads of width 16."""
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaConfig(**{**settings, **changes})


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Norm weights away from 1 and biases away from 0, so that a test sees it if either is lost."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model.eval()


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama in float32 whose attention is far from uniform."""
    torch.manual_seed(seed)
    return randomized(LlamaForCausalLM(tiny_config(**changes)))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `TEXTS`, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def save_source(directory: Path, model: torch.nn.Module, **arguments: Any) -> Path:
    """Write a model and the tiny tokenizer as a Hugging Face checkpoint."""
    model.save_pretrained(directory, **arguments)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def random_ids(batch: int, tokens: int, vocabulary: int = 320, seed: int = 1) -> torch.Tensor:
    """Token ids `[batch, tokens]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, tokens), generator=generator)


def with_cache(cache: Any) -> dict[str, Any]:
    """A cache as the keyword argument by which a forward or `generate` takes it."""
    return {CACHE_NAME: cache}


def shortened(scheme: Any) -> Any:
    """A scheme with groups of 128 tokens, or such a window, as one with groups of 32 and few floats beside them."""
    if max(scheme.step(scheme.key), scheme.step(scheme.value)) < 128 and scheme.window < 128:
        return scheme
    codecs = {}
    for side in ("key", "value"):
        codec = getattr(scheme, side)
        fields = {name: 32 for name in ("group_size", "tile") if getattr(codec, name) == 128}
        codecs[side] = dataclasses.replace(codec, **fields)
    return dataclasses.replace(scheme, **codecs, sinks=min(scheme.sinks, 4), window=min(scheme.window, 8))


def convert_flags(source: Path, target: Path, *flags: str) -> list[str]:
    """Arguments of the conversion script for a tiny source."""
    return ["--model_path", str(source), "--save_directory", str(target), "--calib_texts", *TEXTS, *flags]


def run_python(code: str, *arguments: str, environment: dict[str, str] | None = None) -> Any:
    """Run code in a new process that cannot import Octavo; returns what it prints last, read as JSON."""
    hidden = "import sys; sys.modules['octavo'] = None\n" + code
    done = subprocess.run(
        [sys.executable, "-c", hidden, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def files_below(directory: Path) -> list[str]:
    """Everything below a directory, as sorted relative paths."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def assert_one_error_line(captured: str, *parts: str) -> None:
    """What a failed script printed on stderr: one line that names the error, and each of `parts` in it."""
    lines = [line for line in captured.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:") or ": error: " in line]
    assert "Traceback" not in captured, captured
    assert len(errors) == 1 and lines[-1] == errors[0], captured
    for part in parts:
        assert part in errors[0], f"{part!r} is not in: {errors[0]}"


def quantized_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a converted directory, in the order of its description."""
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("quant_model_weight_*.safetensors")):
        stored.update(load_file(file))
    description = json.loads((directory / "quant_model_description.json").read_text())
    return {name: stored[name] for name in description if name in stored}


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    data = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def any_of(names: Iterable[str], part: str) -> str:
    """The first name that contains `part`."""
    return next(name for name in names if part in name)
