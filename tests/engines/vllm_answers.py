"""What vLLM answers for directories, beside what models of ours say of the same tokens."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ..support import with_cache
from .environments import run_in

FP8 = torch.float8_e4m3fn
FLOAT32 = 2e-7
"""Standard deviation of the relative error of a sum in float32: linears of vLLM and ours are 0.4e-7 to 1e-7 from
float64, in the largest output, and outputs of its first norms 1.6e-7 to 9e-7 from ours."""


@dataclass(frozen=True)
class Job:
    """A directory in an engine's format, the dtype that vLLM computes in, and what it is asked, see `run_vllm.py`."""

    directory: Path
    dtype: str
    prompts: list[list[int]]
    new: int
    top: int
    watched: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def answers_of(jobs: dict[str, Job], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """vLLM's tensors for each job, all in one process, in a cache of the dtype that its options ask for, if they do."""
    stated = [{**vars(job), "directory": str(job.directory)} for job in jobs.values()]
    (folder / "jobs.json").write_text(json.dumps(stated))
    caches = run_in("vllm", "run_vllm.py", folder / "jobs.json", folder)["caches"]
    assert caches == [
        job.options.get("kv_cache_dtype", cache) for job, cache in zip(jobs.values(), caches, strict=True)
    ]
    return {name: load_file(folder / f"{index}.safetensors") for index, name in enumerate(jobs)}


def load_ours(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A directory of ours, where weight-only linears take inputs as they are, as vLLM's do."""
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=dtype)
    for module in model.modules():
        if hasattr(module, "cpu_activations"):
            module.cpu_activations = "float"
    return model


def logprobs_of(model: PreTrainedModel, job: Job, answer: dict[str, torch.Tensor], cache: Any = None) -> torch.Tensor:
    """Ours `[P, S + new, V]`, of the prompts and vLLM's tokens behind them, in a cache that `cache()` makes."""
    rows = []
    for prompt, tokens in zip(job.prompts, answer["tokens"].tolist(), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens]), **(with_cache(cache()) if cache else {})).logits[0]
        rows.append(torch.log_softmax(logits.float(), dim=-1))
    return torch.stack(rows)


@contextmanager
def sums_in_another_order(model: PreTrainedModel) -> Iterator[None]:
    """Within it, outputs of norms are off by what the order of float32 sums makes."""
    generator = torch.Generator().manual_seed(0)

    def blur(_: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + FLOAT32 * torch.randn(output.shape, generator=generator))

    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    handles = [norm.register_forward_hook(blur) for norm in norms]
    assert handles
    yield
    for handle in handles:
        handle.remove()


def gaps_of(ours: torch.Tensor, answer: dict[str, torch.Tensor]) -> torch.Tensor:
    """By how many nats our likeliest token is likelier than vLLM's, `[P, new]`: 0 where it is the same."""
    tokens = answer["tokens"]
    steps = behind(ours, answer)
    return steps.max(dim=-1).values - steps.gather(-1, tokens[..., None])[..., 0]


def behind(ours: torch.Tensor, answer: dict[str, torch.Tensor]) -> torch.Tensor:
    """Ours `[P, new, V]` at vLLM's greedy tokens."""
    return ours[:, -answer["tokens"].shape[1] - 1 : -1]


def on_prompts(ours: torch.Tensor, answer: dict[str, torch.Tensor]) -> torch.Tensor:
    """Ours `[P, S - 1, top]` behind the tokens of prompts, of the tokens that vLLM gives."""
    return ours[:, : answer["ids"].shape[1]].gather(-1, answer["ids"])


def kl(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL of logprobs `[..., top]` in nats, all other tokens taken as one."""
    rest = [(1 - each.double().exp().sum(dim=-1)).clamp_min(1e-12) for each in (reference, found)]
    listed = (reference.double().exp() * (reference - found)).sum(dim=-1)
    return (listed + rest[0] * (rest[0] / rest[1]).log()).mean().item()


def toward_zero(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What vLLM's fp8 cache on the CPU stands for: the next fp8 value towards 0, not the nearest."""
    wanted = (x / scale).clamp(-448, 448)
    nearest = wanted.to(FP8)
    is_larger = nearest.float().abs() > wanted.abs()
    return (nearest.view(torch.uint8) - is_larger.to(torch.uint8)).view(FP8).to(x.dtype) * scale.to(x.dtype)


class TruncatedCache(DynamicCache):
    """A cache of floats that went through `toward_zero`, by the scales of each layer."""

    def __init__(self, scales: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.scales = scales

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of `DynamicCache`."""
        of_key, of_value = self.scales[layer_idx]
        return super().update(toward_zero(key, of_key), toward_zero(value, of_value), layer_idx, *arguments, **options)


def scales_in(directory: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`k_scale` and `v_scale` of each layer of a directory in compressed-tensors."""
    stored = load_file(directory / "model.safetensors")
    layers = sum(name.endswith(".k_scale") for name in stored)
    names = [f"model.layers.{index}.self_attn" for index in range(layers)]
    return [(stored[f"{name}.k_scale"], stored[f"{name}.v_scale"]) for name in names]
