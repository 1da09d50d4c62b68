"""What `engines.py` compares: engines, how each is limited to AVX2, contenders, and a model of random weights."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.logging import disable_progress_bar

NATIVE, AVX2 = "native", "avx2"


@dataclass(frozen=True)
class Engine:
    """A program that runs models.

    Attributes:
        script: its worker, of `benchmarks/engines/`.
        environment: folder of its virtual environment; "" for the one that runs this.
        avx2: variables that limit it to AVX2; None where it cannot be limited.
        avx2_environment: the environment that takes the place of the other then.
    """

    script: str
    environment: str = ""
    avx2: Mapping[str, str] | None = None
    avx2_environment: str = ""


_TORCH_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ENGINES = {
    "transformers": Engine("torch_engine.py", avx2=_TORCH_AVX2),
    "octavo": Engine("torch_engine.py", avx2={**_TORCH_AVX2, "OCTAVO_ISA": "avx2"}),
    "openvino": Engine("openvino_engine.py", "openvino", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "llama.cpp": Engine("llama_cpp_engine.py", "llama_cpp", {}, "llama_cpp_avx2"),
    "vllm": Engine("vllm_engine.py", "vllm"),
}


@dataclass(frozen=True)
class Contender:
    """An engine with a kind of weights and cache.

    Attributes:
        name: of the row.
        engine: key of `ENGINES`.
        kind: what it competes with.
        flags: of our conversion; none where nothing is converted.
        preparing: arguments of the worker's `prepare`; None where it takes the checkpoint as it is.
        loading: arguments of the worker's `load`.
    """

    name: str
    engine: str
    kind: str
    flags: tuple[str, ...] = ()
    preparing: Mapping[str, Any] | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)


EIGHT, FOUR, FLOAT = "8 bit", "4 bit", "float weights"
KINDS = (EIGHT, FOUR, FLOAT)
EIGHT_BIT = ("--preset", "eight-bit")
"""README's quickstart."""
FOUR_BIT = ("--preset", "four-bit")
FOR_RANDOM_WEIGHTS = ("--anti_method", "", "--w_method", "MinMax")
"""Flags that follow where weights are random: what takes time in a conversion and none in the model."""

CONTENDERS = (
    Contender("Octavo, eight-bit", "octavo", EIGHT, EIGHT_BIT),
    Contender("OpenVINO int8, u8 cache", "openvino", EIGHT, (), {"weights": "int8", "flags": []}, {"cache": "u8"}),
    Contender("llama.cpp Q8_0, q8_0 cache", "llama.cpp", EIGHT, (), {"weights": "q8_0"}, {"cache": "q8_0"}),
    Contender("vLLM W8A8, fp8 cache", "vllm", EIGHT, (), {}, {"cache": "fp8"}),
    Contender("Octavo, four-bit", "octavo", FOUR, FOUR_BIT),
    Contender(
        "OpenVINO int4, u8 cache",
        "openvino",
        FOUR,
        (),
        {"weights": "int4", "flags": ["--group-size-fallback", "adjust"]},
        {"cache": "u8"},
    ),
    Contender("llama.cpp Q4_K_M, q8_0 cache", "llama.cpp", FOUR, (), {"weights": "q4_k_m"}, {"cache": "q8_0"}),
    Contender("Octavo, two lines, int8-token", "octavo", FLOAT, loading={"scheme": "int8-token"}),
    Contender("transformers float32", "transformers", FLOAT),
)

RANDOM = "llama-1b-random"
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_random_model(target: Path, tokenizer_source: Path, shape: Mapping[str, Any] = LLAMA_1B) -> None:
    """A Llama of random weights in float16, with the tokenizer of another checkpoint, whose vocabulary is smaller."""
    disable_progress_bar()
    torch.manual_seed(0)
    partial = target.with_name(target.name + ".partial")
    AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.float16).save_pretrained(partial)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_source / file, partial)
    partial.rename(target)
