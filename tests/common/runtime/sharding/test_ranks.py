"""Two and four ranks on the CPU, each with a share of a model: the tokens and logits of one process with all of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from octavo import prepare
from octavo.common.convert import api as conversion
from octavo.common.errors import OctavoError
from octavo.common.runtime.passes import whole_passes
from octavo.common.runtime.sharding.ranks import Ranks, ranks_asked_for
from octavo.models import llama3, phi3, qwen2, qwen3_moe

from ....metrics import rmse_in_std
from ....support import convert_flags, quantized_tensors, random_ids, randomized, save_source, tiny_config, tiny_llama
from ....tolerances import TOLERANCES
from .launch import shared

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": None,
}  # fmt: skip
IDS = random_ids(2, 20)


def _fields() -> dict[str, Any]:
    return {name: value for name, value in tiny_config(**SIZES).to_diff_dict().items() if name != "model_type"}


def _llama() -> torch.nn.Module:
    return tiny_llama(**SIZES)


def _qwen2() -> torch.nn.Module:
    """With biases of k that are large in some rotary pairs of one KV head."""
    torch.manual_seed(0)
    model = randomized(Qwen2ForCausalLM(Qwen2Config(**_fields())))
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[3] += 40
    return model


def _qwen3_moe() -> torch.nn.Module:
    """The first layer has four experts, and the second a plain MLP."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [1]}
    return randomized(Qwen3MoeForCausalLM(Qwen3MoeConfig(**_fields(), **experts)))


def _phi3() -> torch.nn.Module:
    """q, k and v are one linear, and gate and up."""
    torch.manual_seed(0)
    return randomized(Phi3ForCausalLM(Phi3Config(**{**_fields(), "pad_token_id": 0})))


def _llama_bf16() -> torch.nn.Module:
    return _llama().bfloat16()


LARGEST_SHARE = {2: 0.75, 4: 0.5}
"""By ranks, of the bytes beside embedding and last linear; in so small a model norms and scales count."""
W4 = ("--quantization", "w4a16")
MODELS = {
    "llama": (_llama, llama3, (*W4, "--group_size", "0", "--w_sym", "False", "--scheme", "int8-token")),
    "llama in groups": (_llama, llama3, (*W4, "--group_size", "32", "--scheme", "ascend-fa")),
    "llama static": (_llama, llama3, ("--quantization", "w8a8", "--scheme", "ascend-c8")),
    "llama fp8": (_llama, llama3, ("--quantization", "wfp8afp8_dynamic", "--scheme", "int8-token")),
    "llama of layers": (_llama, llama3, ("--quantization", "w8a8_dynamic", "--scheme", "{layers}")),
    "llama in bfloat16": (_llama_bf16, llama3, ("--quantization", "w8a8_dynamic", "--scheme", "ascend-c8")),
    "phi3": (_phi3, phi3, ("--quantization", "w8a8_dynamic", "--scheme", "int8-token")),
    "qwen2": (_qwen2, qwen2, ("--quantization", "w8a8_dynamic", "--scheme", "int8-token")),
    "qwen3_moe": (_qwen3_moe, qwen3_moe, ("--quantization", "w8a8_dynamic", "--scheme", "int8-token")),
}
LAYERS = '{"name": "of layers", "key": {}, "value": {}, "layers": {"0": "int8-token"}}'
"""A scheme of static scales per channel, and other codecs in the first layer."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted models, by their names in `MODELS`."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "layers.json").write_text(LAYERS)
    made = {}
    for name, (build, architecture, flags) in MODELS.items():
        source = root / build.__name__
        if not source.exists():
            save_source(source, build())
        given = [flag.format(layers=root / "layers.json") for flag in flags]
        made[name] = root / name.replace(" ", "_")
        assert conversion.main(architecture.ARCHITECTURE, convert_flags(source, made[name], *given)) == 0
    return made


def _whole(name: str, directory: Path) -> torch.nn.Module:
    return MODELS[name][1].ARCHITECTURE.model_class.from_pretrained(directory).eval()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_what_one_process_does(directories: dict[str, Path], ranks: int, tmp_path: Path) -> None:
    """There are two KV heads, so that of four ranks each has one that another has too."""
    found = shared(directories, IDS, ranks, tmp_path)
    for name, directory in directories.items():
        model = _whole(name, directory)
        cache = model.new_cache()
        with torch.inference_mode(), whole_passes(model.base_model):
            logits = model(IDS, **{model.base_model.octavo_cache_argument: cache}).logits
            tokens = model.generate(IDS, max_new_tokens=16, do_sample=False)
        single = sum(part.nbytes for part in [*model.parameters(), *model.buffers()])
        whole = sum(part.nbytes for part in [*model.lm_head.parameters(), *model.model.embed_tokens.parameters()])
        for of_rank in found:
            own = of_rank[name]
            expected = found[0][name]["tokens"] if "bfloat16" in name else tokens  # its rounding decides near ties
            assert torch.equal(own["tokens"], expected), name
            assert torch.equal(own["logits"], found[0][name]["logits"]), name
            most = "ranks rmse bfloat16" if "bfloat16" in name else "logits rmse with codes tipped over"
            assert rmse_in_std(own["logits"].float(), logits.float()) < TOLERANCES[most], name
            assert own["heads"] == own["config"] == 1
            assert own["cache_bytes"] * 2 == cache.nbytes() and own["comes_back"]
            assert own["model_bytes"] - whole < LARGEST_SHARE[ranks] * (single - whole), name
        for rank, of_rank in enumerate(found):
            head = rank * 2 // ranks
            different, save, load = of_rank[name]["errors"]
            assert different == (
                "ranks were given different tokens, and each has a share of one model: give all the same, and where "
                "tokens are sampled, the same seed (torch.manual_seed)"
            )
            assert save == "save_pretrained: this model is one rank's share; save one that is loaded without tp_plan"
            assert load.endswith(
                f".safetensors: holds KV heads {1 - head} to {1 - head} of 2 of its model, and this one has KV heads "
                f"{head} to {head} of 2: each rank saves and loads a file of its own, and one process one of all"
            )


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"tp_plan": {"layers.*.mlp.up_proj": "colwise"}}, "say tp_plan='auto'"),
        ({"tp_plan": "auto", "device_map": "auto"}, "leave out device_map"),
        ({"tp_plan": "auto", "device_mesh": object()}, "device_mesh is not served"),
        ({"distributed_config": {"tp_plan": "auto", "fsdp_size": 2}}, "fsdp_size=2: ranks share heads and channels"),
        ({"distributed_config": {"tp_size": 2, "enable_expert_parallel": True}}, "a part of every expert instead"),
        ({"tp_plan": "auto"}, "start it by torchrun --nproc_per_node=N"),
        ({"tp_size": 2}, "this one is alone"),
    ],
)
def test_what_ranks_do_not_serve_is_refused(
    arguments: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(OctavoError, match=line.replace("(", r"\(")):
        ranks_asked_for(arguments)


def test_nothing_is_shared_where_nobody_asks() -> None:
    for arguments in ({}, {"device_map": "cpu"}, {"tp_size": 1}, {"distributed_config": {}}):
        assert ranks_asked_for(arguments) is None


def test_processes_that_do_not_find_one_another_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(OctavoError, match=r"processes do not find one another .*MASTER_ADDR"):
        ranks_asked_for({"tp_plan": "auto"})


def test_an_accelerator_that_torch_is_built_for_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch for CUDA, which pip installs, on a machine without a GPU: processes meet by gloo."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    asked, places = [], []
    monkeypatch.setattr(torch.distributed, "init_process_group", asked.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    for backend in ("gloo", "undefined"):  # the latter of a program that started them without naming one
        monkeypatch.setattr(torch.distributed, "get_backend", lambda backend=backend: backend)
        places.append(ranks_asked_for({"tp_plan": "auto"}))
    assert asked == ["gloo"] * 2 and places == [Ranks(0, 2, torch.device("cpu"))] * 2


def two_ranks(monkeypatch: pytest.MonkeyPatch, size: int = 2, rank: int = 0) -> None:
    """Let a load take itself for one of some ranks."""

    def asked_for(arguments: dict[str, Any]) -> Ranks:
        assert arguments.pop("tp_plan") == "auto"
        return Ranks(rank, size, torch.device("cpu"))

    monkeypatch.setattr("octavo.common.runtime.model.ranks_asked_for", asked_for)


@pytest.mark.parametrize(
    ("size", "changes", "flags", "line"),
    [
        (3, {}, (), "8 query heads on 2 KV heads cannot be shared among 3 ranks"),
        (4, {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6}, (), "on 6 KV heads cannot be"),
        (2, {"intermediate_size": 97}, (), "intermediate_size 97 cannot be shared among 2 ranks"),
        (2, {"intermediate_size": 96}, (*W4, "--group_size", "32"),
         r"model.layers.0.mlp.down_proj: 3 groups of 32 input channels cannot be shared among 2 ranks; convert with a"),
        (4, {"intermediate_size": 64}, (*W4, "--group_size", "0"), "down_proj: int4 lies in blocks of 32"),
        (2, {}, ("--quantization", "w8a8_mixed"), "W8A8_MIXED keeps columns in float"),
    ],
)  # fmt: skip
def test_shares_that_cannot_be_are_refused(
    size: int,
    changes: dict[str, Any],
    flags: tuple[str, ...],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = save_source(tmp_path / "source", tiny_llama(**{**SIZES, **changes})), tmp_path / "converted"
    if flags:
        assert conversion.main(llama3.ARCHITECTURE, convert_flags(source, target, *flags)) == 0
    two_ranks(monkeypatch, size)
    with pytest.raises(OctavoError, match=line):
        llama3.ARCHITECTURE.model_class.from_pretrained(target if flags else source, tp_plan="auto")


def test_weights_that_are_not_in_safetensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_source(tmp_path / "source", _llama())
    torch.save(_llama().state_dict(), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    two_ranks(monkeypatch)
    with pytest.raises(OctavoError, match="tp_plan reads shares of safetensors files, and there are none"):
        llama3.ARCHITECTURE.model_class.from_pretrained(source, tp_plan="auto")


def test_a_stock_model_that_transformers_shares_is_refused() -> None:
    model = _llama()
    model._tp_size = 2
    with pytest.raises(OctavoError, match="transformers shares it among ranks; load it by the zoo's class"):
        prepare(model)


def test_shares_of_a_float_model_are_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _llama()
    source = save_source(tmp_path / "source", whole)
    two_ranks(monkeypatch, 4)
    model = llama3.ARCHITECTURE.model_class.from_pretrained(source, tp_plan="auto")
    of_whole, own = whole.model.layers[0], model.model.layers[0]
    assert torch.equal(own.self_attn.q_proj.weight, of_whole.self_attn.q_proj.weight[:32])
    assert torch.equal(own.self_attn.k_proj.weight, of_whole.self_attn.k_proj.weight[:16])
    assert torch.equal(own.self_attn.o_proj.weight, of_whole.self_attn.o_proj.weight[:, :32])
    assert torch.equal(own.mlp.down_proj.weight, of_whole.mlp.down_proj.weight[:, :32])
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)


def test_scales_of_k_and_v_are_shared_by_their_names_in_vllm_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = save_source(tmp_path / "source", _llama()), tmp_path / "converted"
    flags = ("--quantization", "w8a8", "--scheme", "ascend-c8", "--target", "vllm-ascend-0.23")
    assert conversion.main(llama3.ARCHITECTURE, convert_flags(source, target, *flags)) == 0
    stored = load_file(target / "quant_model_weight_w8a8.safetensors")
    two_ranks(monkeypatch, rank=1)
    model = llama3.ARCHITECTURE.model_class.from_pretrained(target, tp_plan="auto")
    for index, layer in enumerate(model.model.layers):
        of_layer = f"model.layers.{index}.self_attn.attn"
        for part in ("k_cache_scale", "v_cache_scale"):
            assert torch.equal(getattr(layer.self_attn.attn, part), stored[f"{of_layer}.{part}"][16:])


def test_each_rank_takes_off_the_zero_point_of_its_own_channels(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the first did it for all, parts of a sum would be far larger than the sum, and be rounded so in bfloat16."""
    name, size = "model.layers.0.self_attn.o_proj", 4
    stored = quantized_tensors(directories["llama static"])
    offset, codes = stored[f"{name}.input_offset"].int(), stored[f"{name}.weight"].int()
    assert offset.item() != 0
    found = []
    for rank in range(size):
        two_ranks(monkeypatch, size, rank)
        model = llama3.ARCHITECTURE.model_class.from_pretrained(directories["llama static"], tp_plan="auto")
        found.append(model.get_submodule(name).quant_bias)
    added = [-offset * part.sum(dim=1) for part in codes.chunk(size, dim=1)]
    whole = stored[f"{name}.quant_bias"]
    assert torch.equal(sum(found), whole)
    assert all(torch.equal(*pair) for pair in zip(found[1:], added[1:], strict=True))
    assert torch.equal(found[0], added[0])  # there is no bias


def test_a_share_has_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is summed over ranks would count as a constant."""
    source = save_source(tmp_path / "source", _llama())
    two_ranks(monkeypatch)
    monkeypatch.setattr(Ranks, "sum", lambda self, part: part.detach())
    monkeypatch.setattr(Ranks, "check_same", lambda self, ids: None)
    model = llama3.ARCHITECTURE.model_class.from_pretrained(source, tp_plan="auto")
    loss = model(IDS, labels=IDS).loss
    with pytest.raises(OctavoError, match="a model that is shared among ranks has no gradient"):
        loss.backward()
