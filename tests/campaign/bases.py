"""What is damaged: tiny checkpoints, what the conversion script makes of them, and what each computes.

sources/NAME/           a checkpoint, ordinary or in codes
outputs/NAME/           a converted one
outputs/NAME.logits     what it computes of `IDS`, a safetensors file
statistics.safetensors  of the Llama
"""

import contextlib
import io
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM

from octavo.common.architecture import Architecture
from octavo.common.convert.api import main
from octavo.models.llama3 import ARCHITECTURE as LLAMA
from octavo.models.qwen2 import ARCHITECTURE as QWEN2

from ..common.convert.source.coded_layouts import PASSED, change_weights
from ..common.convert.source.coded_sources import write_coded
from ..metrics import relative_rmse
from ..support import convert_flags, random_ids, randomized, save_source, tiny_config
from ..tolerances import TOLERANCES

IDS = random_ids(1, 160)
"""More tokens than the schemes below keep in float."""
SHAPE = {"num_hidden_layers": 2, "head_dim": 32, "rope_theta": 50000.0, "rms_norm_eps": 1e-5, "initializer_range": 0.1}
"""Of the Llama; a head is wider than hidden_size / heads, and no value that matters is transformers' default."""
SHARD_BYTES = 60_000
ARCHITECTURES = {"llama": LLAMA, "qwen2": QWEN2, "gptq": LLAMA, "fp8": LLAMA}


@dataclass(frozen=True)
class Output:
    """How a converted checkpoint is made.

    Attributes:
        source: name of the checkpoint that it is made of.
        flags: of the conversion script.
        is_sharded: whether the weights are in several files.
    """

    source: str
    flags: tuple[str, ...]
    is_sharded: bool = False


OUTPUTS = {
    "w8a8-c8": Output("llama", ("--use_kvcache_quant", "True")),
    "w8a8-fa-m2": Output("llama", ("--use_fa_quant", "True", "--anti_method", "m2")),
    "w4a16-octavo-4": Output("llama", ("--w_bit", "4", "--a_bit", "16", "--w_sym", "False", "--scheme", "octavo-4")),
    "w8a16-kvquant-4": Output("llama", ("--a_bit", "16", "--group_size", "32", "--scheme", "kvquant-4")),
    "fp8-vllm": Output("llama", ("--quantization", "wfp8afp8", "--scheme", "vllm-fp8-head")),
    "mixed-lmdeploy": Output("llama", ("--quantization", "w8a8_mixed", "--scheme", "lmdeploy-int8-ptq")),
    "qwen2-sharded": Output("qwen2", ("--use_kvcache_quant", "True"), is_sharded=True),
    "gptq-int8": Output("gptq", ("--scheme", "int8-token")),
    "fp8-own-scales": Output("fp8", ("--scheme", "vllm-fp8", "--kv_scales", "source")),
    "float-int8-sharded": Output("llama", ("--w_bit", "16", "--a_bit", "16", "--scheme", "int8-token"), True),
}


def _llama() -> torch.nn.Module:

    torch.manual_seed(0)
    return randomized(LlamaForCausalLM(tiny_config(**SHAPE)))


def _qwen2() -> torch.nn.Module:

    shape = {name: value for name, value in tiny_config().to_dict().items() if name in Qwen2Config().to_dict()}
    del shape["model_type"], shape["architectures"]
    torch.manual_seed(1)
    shape |= {"num_hidden_layers": 2, "tie_word_embeddings": True, "rope_theta": 50000.0}
    return randomized(Qwen2ForCausalLM(Qwen2Config(**shape))).bfloat16()


def save_sources(folder: Path) -> None:
    """Write the checkpoints: a Llama in float32, a Qwen2 in bfloat16, tied and in several files; and two in codes."""
    save_source(folder / "llama", _llama())
    save_source(folder / "qwen2", _qwen2(), max_shard_size=SHARD_BYTES)
    write_coded(folder / "gptq", PASSED["gptq, act-order"], num_hidden_layers=2)
    write_coded(folder / "fp8", PASSED["fp8 per channel"], num_hidden_layers=2)
    names = [f"model.layers.{index}.self_attn.{side}_scale" for index in range(2) for side in "kvq"]
    change_weights(folder / "fp8", lambda tensors: tensors.update({name: torch.tensor([0.02]) for name in names}))


def architecture_of(output: str) -> Architecture:
    """The architecture of an output."""
    return ARCHITECTURES[OUTPUTS[output].source]


def convert_quietly(architecture: Architecture, argv: list[str], is_sharded: bool = False) -> int:
    """Run the conversion script in this process; its exit code. Sharded: gigabytes are a few KB."""
    with contextlib.ExitStack() as stack:
        if is_sharded:
            stack.enter_context(mock.patch("octavo.common.convert.run.GIGABYTE", SHARD_BYTES))
        return main(architecture, argv)


def logits_of(directory: Path, architecture: Architecture) -> torch.Tensor:
    """What a converted checkpoint computes of `IDS`, `[1, S, vocabulary]` float32."""
    return compute(architecture.model_class.from_pretrained(directory))


def compute(model: torch.nn.Module) -> torch.Tensor:
    """What a model computes of `IDS`."""
    with torch.inference_mode():
        return model.eval()(IDS, return_dict=True).logits.float()


def difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    """How logits differ, in words; empty if they are equal within the tolerance."""
    if found.shape != expected.shape:
        return f"the result is {tuple(found.shape)}, not {tuple(expected.shape)}"
    error = relative_rmse(found, expected)
    return "" if error <= TOLERANCES["logits"] else f"logits are off by a relative rmse of {error:.3g}"


def expected_logits(bases: Path, output: str) -> torch.Tensor:
    """What an undamaged output computes."""
    return load_file(bases / "outputs" / f"{output}.logits")["logits"]


def _build(bases: Path) -> None:
    save_sources(bases / "sources")
    (bases / "outputs").mkdir()
    for name, output in OUTPUTS.items():
        source, target = bases / "sources" / output.source, bases / "outputs" / name
        flags = [*output.flags, *(("--part_file_size", "1") if output.is_sharded else ())]
        if name == "w8a8-c8":
            flags += ["--save_statistics", str(bases / "statistics.safetensors")]
        code = convert_quietly(architecture_of(name), convert_flags(source, target, *flags), output.is_sharded)
        assert code == 0, f"{name} cannot be made"
        save_file({"logits": logits_of(target, architecture_of(name))}, bases / "outputs" / f"{name}.logits")


def _build_quietly(bases: Path) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            _build(bases)
    except BaseException:
        print(said.getvalue())
        raise


def build(bases: Path) -> None:
    """Make all of it, in a process of its own: this one stays without threads, and can be forked.

    Raises:
        RuntimeError: an undamaged source cannot be converted, or its output not loaded.
    """
    process = multiprocessing.get_context("fork").Process(target=_build_quietly, args=(bases,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("the checkpoints to damage cannot be made; see above")


def load_config(directory: Path) -> PreTrainedConfig:
    """The config of an ordinary checkpoint."""
    return AutoConfig.from_pretrained(directory, local_files_only=True)
