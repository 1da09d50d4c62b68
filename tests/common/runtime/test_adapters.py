"""LoRA adapters on linears in codes and beside a quantized cache: as PEFT loads them, against the sum by hand."""

import copy
import gc
import pickle
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from octavo import QuantizedCache, prepare
from octavo.common.errors import OctavoError
from octavo.common.runtime.decoder_step import fused_pass
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM as QuantizedLlama
from octavo.ops.decoder.cpu import DECODER_KERNEL

from ...support import random_ids, run_python, tiny_llama, with_cache
from ...tolerances import TOLERANCES
from ..convert.weights.test_quantize import every_scheme, name_of
from .checkpoint.test_linear_checkpoints import (
    MODELS,
    linear_names,
    quantized_tensors_of,
    save_quantized,
)

peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's own questions to transformers
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 4, 8
IDS = random_ids(1, 16)


def adapter_of(model: nn.Module, directory: Path, targets: Any = LINEARS, **fields: Any) -> Path:
    """An adapter of random weights as PEFT saves it, of a float model, which is left as it was."""
    fields = {"r": RANK, "lora_alpha": ALPHA, **fields}
    config = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **fields)
    trained = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=generator)
    trained.save_pretrained(directory)
    return directory


def add_by_hand(model: nn.Module, adapter: Path) -> nn.Module:
    """Let the linears of a model add `alpha / r * B A x`, without PEFT."""
    weights = load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in weights if "lora_A" in key]:
        a, b = weights[key], weights[key.replace("lora_A", "lora_B")]
        linear = model.get_submodule(key.removeprefix("base_model.model.").partition(".lora_A")[0])
        linear.register_forward_hook(
            lambda _, args, output, a=a, b=b: (output.float() + args[0].float() @ a.T @ b.T * (ALPHA / RANK)).to(output)
        )
    return model


@torch.no_grad()
def logits(model: nn.Module, scheme: str | None = None) -> torch.Tensor:
    """Of a prompt, and then of one token after another, over one cache: the model's own, or one of a scheme."""
    cache = model.new_cache() if scheme is None else QuantizedCache(model.config, scheme)
    parts = IDS.split((13, 1, 1, 1), dim=1)
    return torch.cat([model(part, **with_cache(cache)).logits for part in parts], dim=1)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).norm() <= TOLERANCES["decoder layer"] * wanted.norm()


@pytest.fixture(params=every_scheme(), ids=name_of)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Qwen2 with biases and linears of one kind."""
    model = MODELS["qwen2"][0]()
    names = linear_names(model)
    tensors = quantized_tensors_of(model, dict.fromkeys(names, request.param))
    labels = dict.fromkeys(names, request.param.label)
    save_quantized(tmp_path / "out", model, tensors, labels, group_size=request.param.group_size)
    return tmp_path / "out"


def test_an_adapter_is_added_to_linears_of_every_kind(directory: Path, tmp_path: Path) -> None:
    build, model_class = MODELS["qwen2"]
    adapter = adapter_of(build(), tmp_path / "adapter")
    model, other = (model_class.from_pretrained(directory).eval() for _ in range(2))
    before, wanted = logits(model), logits(add_by_hand(other, adapter))
    adapted = peft.PeftModel.from_pretrained(model, adapter)
    found = logits(adapted)
    assert_same(found, wanted)
    assert (found - before).norm() > 0.1 * before.norm()
    with adapted.disable_adapter():
        assert_same(logits(adapted), before)
    assert_same(logits(adapted), wanted)


@pytest.fixture
def own(converted: Callable[..., Path]) -> Iterator[Callable[[], nn.Module]]:
    """`own()`: the tiny Llama, converted with static scales of K and V, loaded anew."""
    return lambda: QuantizedLlama.from_pretrained(
        converted("--is_dynamic", "True", "--use_kvcache_quant", "True")
    ).eval()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return adapter_of(tiny_llama(), tmp_path / "an adapter")


def test_both_ways_of_loading_do_the_same(own: Callable[[], nn.Module], adapter: Path) -> None:
    model = own()
    model.load_adapter(str(adapter))
    wanted = logits(add_by_hand(own(), adapter))
    assert_same(logits(model), wanted)
    assert_same(logits(peft.PeftModel.from_pretrained(own(), adapter)), wanted)


def test_generate_goes_on_with_an_adapter(own: Callable[[], nn.Module], adapter: Path) -> None:
    plain, wanted = own(), add_by_hand(own(), adapter).generate(IDS, max_new_tokens=8, do_sample=False)
    adapted = peft.PeftModel.from_pretrained(own(), adapter)
    assert torch.equal(adapted.generate(input_ids=IDS, max_new_tokens=8, do_sample=False), wanted)
    assert not torch.equal(plain.generate(IDS, max_new_tokens=8, do_sample=False), wanted)


def test_several_adapters_take_turns(own: Callable[[], nn.Module], adapter: Path, tmp_path: Path) -> None:
    second = adapter_of(tiny_llama(seed=1), tmp_path / "second", targets=["q_proj", "down_proj"])
    adapted = peft.PeftModel.from_pretrained(own(), adapter, "first")
    adapted.load_adapter(second, "second")
    for name, directory in (("second", second), ("first", adapter)):
        adapted.set_adapter(name)
        assert_same(logits(adapted), logits(add_by_hand(own(), directory)))


def test_what_is_unloaded_is_as_it_was(own: Callable[[], nn.Module], adapter: Path) -> None:
    model = own()
    before = logits(model)
    adapted = peft.PeftModel.from_pretrained(model, adapter)
    with_adapter = logits(adapted)
    assert torch.equal(logits(adapted.unload()), before)
    assert model.peft_config == {}
    assert torch.equal(logits(peft.PeftModel.from_pretrained(model, adapter)), with_adapter)


def test_copies_have_their_own(own: Callable[[], nn.Module], adapter: Path) -> None:
    model = own()
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    before = logits(model)
    model.load_adapter(str(adapter))
    for other in (copied, pickled):
        assert torch.equal(logits(other), before)
        other.load_adapter(str(adapter))
        assert torch.equal(logits(other), logits(model))


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("kind", ["own", "prepared", "copied", "pickled"])
def test_a_model_that_is_dropped_is_freed_at_once(kind: str, own: Callable[[], nn.Module]) -> None:
    model = own() if kind == "own" else prepare(tiny_llama())
    if kind == "copied":
        model = copy.deepcopy(model)
    elif kind == "pickled":
        model = pickle.loads(pickle.dumps(model))
    model.peft_config.admit(peft.LoraConfig(target_modules=["q_proj"], inference_mode=True))
    known = weakref.ref(model)
    del model
    assert known() is None


def test_configs_whose_model_is_gone_take_no_more() -> None:
    adapters = prepare(tiny_llama()).peft_config
    gc.collect()
    for configs in (adapters, pickle.loads(pickle.dumps(adapters))):
        with pytest.raises(OctavoError, match="the model that it is for is gone"):
            configs["default"] = peft.LoraConfig(target_modules=["q_proj"])


class _Hub:
    """Stands in for the hub: the cache of one that holds one adapter, and no way to anything else."""

    def __init__(self, cache: Path, adapter: Path) -> None:
        self.cache, commit = cache, "0" * 40
        repository = cache / "models--org--adapter"
        shutil.copytree(adapter, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)

    def load(self, model: nn.Module) -> None:
        model.load_adapter("org/adapter", adapter_kwargs={"cache_dir": self.cache, "local_files_only": True})


def test_an_adapter_of_the_hub(own: Callable[[], nn.Module], adapter: Path, tmp_path: Path) -> None:
    hub, model = _Hub(tmp_path / "hub", adapter), own()
    hub.load(model)
    assert_same(logits(model), logits(add_by_hand(own(), adapter)))


def test_an_adapter_of_the_hub_that_is_of_another_model(own: Callable[[], nn.Module], tmp_path: Path) -> None:
    other = adapter_of(tiny_llama(intermediate_size=96), tmp_path / "other", targets=["down_proj"])
    hub, model = _Hub(tmp_path / "hub", other), own()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(OctavoError, match="the linear has 128 input channels; the adapter is of another model"):
        hub.load(model)
    assert [name for name, _ in model.named_modules()] == names and model.peft_config == {}


def _warnings_of(add: Callable[[], Any]) -> list[str]:
    """What PEFT says of adapters that are there already."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        add()
    return [text for text in (str(warning.message) for warning in caught) if "Already found" in text]


def test_a_first_adapter_is_no_second(own: Callable[[], nn.Module], adapter: Path) -> None:
    model, stock = own(), tiny_llama()

    def load_both() -> None:
        model.load_adapter(str(adapter))
        stock.load_adapter(str(adapter))
        stock.load_adapter(str(adapter), "second")

    assert not _warnings_of(lambda: own().load_adapter(str(adapter)))
    assert not _warnings_of(lambda: peft.PeftModel.from_pretrained(own(), adapter))
    assert len(_warnings_of(load_both)) == 1  # of the stock model, whose second it is


@pytest.mark.skipif(DECODER_KERNEL.supports() is not None, reason="there is no C compiler")
def test_layers_are_run_whole_only_without_an_adapter(own: Callable[[], nn.Module], adapter: Path) -> None:
    model = own()

    def is_fused() -> bool:
        with torch.no_grad():
            return fused_pass(model.base_model, {"input_ids": IDS, **with_cache(model.new_cache())}) is not None

    assert is_fused()
    adapted = peft.PeftModel.from_pretrained(model, adapter)
    assert not is_fused()
    adapted.unload()
    assert is_fused()


_NEWCOMER = """
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
directory, adapter, file = sys.argv[1:]
ids = torch.load(file)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
with torch.no_grad():
    print(json.dumps(PeftModel.from_pretrained(model, adapter)(ids).logits.tolist()))
"""


def test_a_directory_needs_nothing_but_peft(
    converted: Callable[..., Path], own: Callable[[], nn.Module], adapter: Path, tmp_path: Path
) -> None:
    torch.save(IDS, tmp_path / "ids.pt")
    directory = converted("--is_dynamic", "True", "--use_kvcache_quant", "True")
    found = torch.tensor(run_python(_NEWCOMER, str(directory), str(adapter), str(tmp_path / "ids.pt")))
    with torch.no_grad():
        assert_same(found, add_by_hand(own(), adapter)(IDS).logits)


# What is refused, before anything has changed.


def _changed(**fields: Any) -> Callable[[Any], Any]:
    def change(config: Any) -> Any:
        for name, value in fields.items():
            setattr(config, name, value)
        return config

    return change


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "training": (_changed(inference_mode=False), "train it on the float model"),
    "DoRA": (_changed(use_dora=True), "use_dora asks for more"),
    "PiSSA": (_changed(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the weight"),
    "biases": (_changed(bias="lora_only"), "bias='lora_only'"),
    "parameters": (_changed(target_parameters=["weight"]), "target_parameters asks for more"),
    "whole linears": (_changed(modules_to_save=["up_proj"]), "modules_to_save replaces .*up_proj"),
    "IA3": (lambda _: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], inference_mode=True), "IA3"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_codes_do_not_bear_is_refused(kind: str, own: Callable[[], nn.Module]) -> None:
    change, line = REFUSED[kind]
    config = change(peft.LoraConfig(target_modules=["q_proj"], inference_mode=True, task_type="CAUSAL_LM"))
    model = own()
    names = [name for name, _ in model.named_modules()]
    for add in (lambda: peft.get_peft_model(model, config), lambda: model.add_adapter(config)):
        with pytest.raises(OctavoError, match=line) as caught:
            add()
        assert len(str(caught.value).splitlines()) == 1
    assert [name for name, _ in model.named_modules()] == names and model.peft_config == {}


def test_nothing_is_merged_into_codes(own: Callable[[], nn.Module], adapter: Path) -> None:
    adapted = peft.PeftModel.from_pretrained(own(), adapter)
    before = logits(adapted)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(OctavoError, match="not merged into linears in codes"):
            merge()
    assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("way", ["PeftModel", "load_adapter"])
def test_an_adapter_of_other_sizes(way: str, own: Callable[[], nn.Module], tmp_path: Path) -> None:
    other = adapter_of(tiny_llama(intermediate_size=96), tmp_path / "other", targets=["down_proj"])
    with pytest.raises(OctavoError, match=r"lora_A of the adapter is \[4, 96\], and the linear has 128 input channels"):
        peft.PeftModel.from_pretrained(own(), other) if way == "PeftModel" else own().load_adapter(str(other))


def test_an_adapter_of_more_layers(own: Callable[[], nn.Module], tmp_path: Path) -> None:
    other = adapter_of(tiny_llama(num_hidden_layers=4), tmp_path / "other")
    with pytest.raises(OctavoError, match=r"changes model.layers.3.* which this model has not"):
        own().load_adapter(str(other))


def test_an_adapter_with_a_whole_weight(own: Callable[[], nn.Module], tmp_path: Path) -> None:
    adapter = adapter_of(tiny_llama(), tmp_path / "adapter", targets=["q_proj"])
    file, name = adapter / "adapter_model.safetensors", "model.layers.0.mlp.up_proj.weight"
    save_file(load_file(file) | {f"base_model.model.{name}": torch.zeros(128, 64)}, file)
    with pytest.raises(OctavoError, match=r"up_proj\.weight is given in torch\.float32, and this layer holds codes"):
        peft.PeftModel.from_pretrained(own(), adapter)
    with pytest.raises(OctavoError, match=f"{name} replaces what is in codes"):
        own().load_adapter(str(adapter))


def test_an_embedding_in_codes(source: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
    model = QuantizedLlama.from_pretrained(converted("--quantization", "w8a16", "--embeddings", "int8"))
    adapter = adapter_of(tiny_llama(), tmp_path / "adapter", targets=["embed_tokens", "q_proj"])
    with pytest.raises(OctavoError, match="embed_tokens, which is an embedding in codes"):
        peft.PeftModel.from_pretrained(model, adapter)
