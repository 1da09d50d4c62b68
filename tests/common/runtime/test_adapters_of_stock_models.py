"""LoRA adapters on models of transformers beside a quantized cache, put in before `prepare` and behind it."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from octavo import QuantizedCache, prepare
from octavo.common.errors import OctavoError
from octavo.common.runtime.quantized_linear import QuantizedLinear

from ...support import tiny_llama, with_cache
from .checkpoint.test_linear_checkpoints import MODELS, linear_names
from .fused_models import model_of
from .test_adapters import IDS, adapter_of, add_by_hand, assert_same, logits, peft, pytestmark  # noqa: F401


@pytest.mark.parametrize("order", ["prepare, then PEFT", "PEFT, then prepare", "load_adapter, then prepare"])
@pytest.mark.parametrize("kind", ["llama3", "qwen2", "phi3", "gemma3"])
def test_a_stock_model_with_a_quantized_cache(kind: str, order: str, tmp_path: Path) -> None:
    model, other = model_of(kind, vocab_size=320), model_of(kind, vocab_size=320)
    linears = {name.rpartition(".")[2] for name in linear_names(other.base_model) if "proj" in name} | {"o_proj"}
    adapter = adapter_of(other, tmp_path / "adapter", targets=sorted(linears))
    wanted = logits(add_by_hand(other, adapter), "int8-token")
    if order == "prepare, then PEFT":
        adapted = peft.PeftModel.from_pretrained(model, adapter)
    else:
        stock = type(model)(copy.deepcopy(model.config)).eval()
        stock.load_state_dict(model.state_dict())
        if order.startswith("PEFT"):
            adapted = prepare(peft.PeftModel.from_pretrained(stock, adapter))
        else:
            stock.load_adapter(str(adapter))
            adapted = prepare(stock)
    found = logits(adapted, "int8-token")
    assert_same(found, wanted)
    if order == "prepare, then PEFT":
        adapted.merge_adapter()
        assert_same(logits(adapted, "int8-token"), wanted)
        assert_same(logits(adapted.merge_and_unload(), "int8-token"), wanted)


def test_names_of_linears_that_are_fused_here(tmp_path: Path) -> None:
    model = model_of("phi3")
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], inference_mode=True)
    with pytest.raises(OctavoError, match=r"changes q_proj, and this model has self_attn\.qkv_proj and"):
        model.peft_config.admit(config)


@pytest.mark.parametrize("order", ["prepare first", "PEFT first"])
def test_what_reads_biases_that_are_folded(order: str) -> None:
    model = model_of("qwen2")
    config = peft.LoraConfig(target_modules=["k_proj"], use_dora=True, inference_mode=True, task_type="CAUSAL_LM")
    if order == "prepare first":
        with pytest.raises(OctavoError, match="use_dora reads biases that prepare folds"):
            peft.get_peft_model(model, config)
        return
    stock = type(model)(copy.deepcopy(model.config)).eval()
    adapted = peft.get_peft_model(stock, config)
    with pytest.raises(OctavoError, match="use_dora reads biases that prepare folds"):
        prepare(adapted)


def _unload(model: nn.Module, adapter: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(model, adapter).unload()


def _merge(model: nn.Module, adapter: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


@pytest.mark.parametrize("leave", [_unload, _merge])
def test_biases_stay_guarded_when_an_adapter_has_left(
    leave: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    adapter = adapter_of(MODELS["qwen2"][0](), tmp_path / "adapter", targets=["k_proj"])
    model = leave(prepare(MODELS["qwen2"][0]()), adapter)
    config = peft.LoraConfig(target_modules=["k_proj"], use_dora=True, inference_mode=True, task_type="CAUSAL_LM")
    with pytest.raises(OctavoError, match="use_dora reads biases that prepare folds"):
        peft.get_peft_model(model, config)


def test_prompts_that_are_learnt_stay_where_they_are() -> None:
    model = tiny_llama()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, inference_mode=True)
    adapted = prepare(peft.get_peft_model(model, config)).eval()
    with torch.no_grad():
        prompts = adapted.get_prompt(batch_size=1)
        embeds = torch.cat([prompts, model.get_input_embeddings()(IDS)], dim=1)
        wanted = model(inputs_embeds=embeds, **with_cache(QuantizedCache(model.config, "int8-token"))).logits
        assert_same(adapted(IDS, **with_cache(QuantizedCache(model.config, "int8-token"))).logits, wanted)


def test_no_layer_of_ours_is_left_where_nothing_is_in_codes() -> None:
    adapted = peft.get_peft_model(model_of("qwen2"), peft.LoraConfig(target_modules=["k_proj"], task_type="CAUSAL_LM"))
    assert not any(isinstance(module, QuantizedLinear) for module in adapted.modules())
    assert adapted.get_submodule("base_model.model.model.layers.0.self_attn.k_proj").base_layer.folds_bias
