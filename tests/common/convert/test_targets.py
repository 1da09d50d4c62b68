"""Directories for engines on Ascend: their names and dtypes, what is refused for which, and what is only said."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

from octavo.common.architecture import load_architecture
from octavo.common.convert.api import main
from octavo.common.convert.targets import engine_dtype
from octavo.common.convert.units import grouped
from octavo.models.llama3 import ARCHITECTURE
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ...models.test_qwen3_moe import tiny_moe
from ...support import (
    assert_one_error_line,
    convert_flags,
    quantized_tensors,
    random_ids,
    randomized,
    save_source,
    tiny_config,
    tiny_llama,
)
from .source.coded_sources import Layout, args, ct_config, fp8, packed_ct, write_coded

pytestmark = pytest.mark.usefixtures("one_thread")

C8 = ("--use_kvcache_quant", "True")
Q, K, V = (f"model.layers.0.self_attn.{part}_proj" for part in "qkv")


def description_of(directory: Path) -> dict[str, str]:
    return json.loads((directory / "quant_model_description.json").read_text())


def test_scales_of_vllm_ascend_0_23_are_those_of_mindie(converted: Callable[..., Path]) -> None:
    mindie, newest, older = (
        converted(*C8, "--target", target) for target in ("mindie", "vllm-ascend", "vllm-ascend-0.23")
    )
    assert description_of(mindie) == description_of(newest) == description_of(older)  # it finds layers by these names
    tensors, renamed, same = (
        load_file(path / "quant_model_weight_w8a8.safetensors") for path in (mindie, older, newest)
    )
    assert same.keys() == tensors.keys()
    for layer in range(3):
        attention = f"model.layers.{layer}.self_attn"
        for part in "kv":
            for end in ("scale", "offset"):
                found = renamed.pop(f"{attention}.attn.{part}_cache_{end}")
                assert torch.equal(found, tensors.pop(f"{attention}.{part}_proj.kv_cache_{end}"))
    assert renamed.keys() == tensors.keys()

    ids = random_ids(1, 40)
    logits = []
    for directory in (mindie, older):
        model = LlamaForCausalLM.from_pretrained(directory).eval()
        assert model.scheme.name == "ascend-c8"
        with torch.inference_mode():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


REFUSED = [
    ("vllm-ascend", ("--use_fa_quant", "True"), "registers FAKQuant and INT8_DYNAMIC alone"),
    ("vllm-ascend-0.23", ("--use_fa_quant", "True"), "--target mindie"),
    ("mindie", ("--scheme", "int8-token"), "give --scheme ascend-c8 or ascend-fa"),
    ("vllm-ascend", ("--scheme", "int8-token"), "give --scheme ascend-c8"),
    (
        "vllm-ascend",
        ("--w_bit", "4", "--a_bit", "16"),
        "has no linears of W4A16; give one of W8A8, W8A8_DYNAMIC",
    ),
    ("vllm-ascend", ("--w_bit", "4", "--a_bit", "16"), "W4A16 without biases is written by --format vllm-ascend-w4a8"),
    ("mindie", ("--w_bit", "4", "--a_bit", "16"), "MindIE reads W4A16 in another layout of codes; give one of W8A8, "),
    ("mindie", ("--quantization", "w8a8_mixed"), "has no linears of W8A8_MIXED"),
    ("mindie", ("--quantization", "fp8"), "has no linears of WFP8AFP8_DYNAMIC; give one of W8A8, W8A8_DYNAMIC, W8A16"),
    ("vllm-ascend", ("--quantization", "wfp8afp8"), "WFP8AFP8; give one of W8A8, W8A8_DYNAMIC, W8A16, W8A8_MIX ("),
    ("vllm-ascend", ("--pdmix", "True", "--anti_method", "m2"), "skips the bias that --anti_method m2 gives"),
    ("vllm-ascend", ("--a_bit", "16", "--group_size", "64"), "by --group_size 0, not 64"),
    ("mindie", ("--a_bit", "16", "--group_size", "32"), "by --group_size 0, 64, 128, 256, not 32"),
    ("mindie", ("--embeddings", "int8"), "leave out --embeddings"),
    ("vllm-ascend", ("--a_bit", "16", "--w_sym", "False"), "adds the zero points of weights"),
    ("mindie", ("--disable_names", "*.q_proj"), "loads model.layers.0.self_attn.q_proj and"),
    ("vllm-ascend", ("--disable_names", "*.up_proj"), "name both in --disable_names, or none"),
    ("mindie", ("--is_dynamic", "True", "--anti_method", "m2"), "skips the bias that --anti_method m2 gives"),
    ("mindie", ("--anti_method", "m2", "--disable_names", "*.gate_proj", "*.up_proj", "*.q_proj"), "loads model."),
]


@pytest.mark.parametrize(("target", "flags", "reason"), REFUSED)
def test_what_an_engine_cannot_read_is_refused(
    target: str, flags: tuple[str, ...], reason: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", "--target", target, *flags)) == 1
    assert_one_error_line(capfd.readouterr().err, f"--target {target}: ", reason)
    assert not (tmp_path / "out").exists()


NOTED = [
    (("--a_bit", "16", "--w_sym", "False"), ("note: vllm-ascend adds the zero points",)),
    (("--is_dynamic", "True", "--anti_method", "m2"), ("note: MindIE skips the bias", "note: vllm-ascend skips")),
    (("--disable_names", "*.up_proj"), ("note: MindIE loads", "note: vllm-ascend loads")),
    ((*C8, "--fa_amp", "11"), ("note: MindIE's older loader (atb_llm) looks for scales of K and V in every layer",)),
    (("--anti_method", "m2"), ()),
    (("--quantization", "w8a8_mixed", "--disable_names", "*.up_proj"), ()),
]


@pytest.mark.parametrize(("flags", "notes"), NOTED)
def test_without_a_target_it_is_said(
    flags: tuple[str, ...], notes: tuple[str, ...], source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags)) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(said) == len(notes)
    for line, note in zip(said, notes, strict=True):
        assert line.startswith(note)


LABELLED = [
    (("--pdmix", "True"), "mindie", "W8A8_MIX", ()),
    (("--pdmix", "True"), "vllm-ascend-0.23", "W8A8_MIX", ()),
    (("--quantization", "fp8"), "vllm-ascend", "W8A8FP8_DYNAMIC", ("--quantization", "w8a8fp8_dynamic")),
]


@pytest.mark.parametrize(("flags", "target", "label", "same"), LABELLED)
def test_labels_of_engines_are_those_of_the_same_tensors(
    flags: tuple[str, ...], target: str, label: str, same: tuple[str, ...], converted: Callable[..., Path]
) -> None:
    """Only the description differs, by which engines go; the same linears are loaded here."""
    named, plain = converted(*flags, "--target", target), converted(*same)
    description = description_of(named)
    assert description["model_quant_type"] == description[f"{Q}.weight"] == description[f"{Q}.weight_scale"] == label
    tensors = load_file(named / f"quant_model_weight_{label.lower()}.safetensors")
    expected = quantized_tensors(plain)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    ids = random_ids(1, 20)
    with torch.inference_mode():
        logits = [LlamaForCausalLM.from_pretrained(path).eval()(ids).logits for path in (named, plain)]
    assert torch.equal(*logits)


def test_a_mix_is_of_static_w8a8(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ("--pdmix", "True", "--is_dynamic", "True")
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags)) == 1
    assert_one_error_line(capfd.readouterr().err, "--pdmix: no linear is in static W8A8", "give --quantization w8a8")


SERVED = {
    "mindie": "torchrun --nproc_per_node 1 --master_port 20030 -m examples.run_pa --model_path {}  # MindIE of 2026-04",
    "vllm-ascend-0.23": "vllm serve {} --quantization ascend  # vllm-ascend 0.23.0",
    "vllm-ascend": "vllm serve {} --quantization ascend  # vllm-ascend 0.25.1rc1",
}


@pytest.mark.parametrize("target", SERVED)
def test_the_summary_names_the_command_of_the_target(
    target: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", "--target", target)) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(SERVED[target].format(tmp_path / "out"))


def test_one_scale_for_a_weight_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """fp8 of a source may have one scale for a whole weight, and vllm-ascend has one for each output channel."""
    source = tmp_path / "source"
    tokens = args(8, "float", "token", dynamic=True)
    config = ct_config("float-quantized", args(8, "float", "tensor"), tokens)
    write_coded(source, Layout(partial(fp8, per_tensor=True), config))
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", "--target", "vllm-ascend")) == 1
    assert_one_error_line(capfd.readouterr().err, "reads a scale for each output channel, and model.layers.0.")


def test_of_another_format_nothing_is_said_of_them(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags, notes = NOTED[0]
    assert notes and main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags, "--format", "gguf")) == 0
    said = capfd.readouterr()
    assert "note: " not in said.err
    assert said.out.splitlines()[-1].startswith("llama-server --model ")


def test_a_bias_of_the_architecture_may_be_shifted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Qwen2 has biases of q, k and v, which readers load with every kind of linear; of gate and up it has none."""
    torch.manual_seed(0)
    settings = {**tiny_config().to_dict(), "model_type": "qwen2"}
    model = randomized(Qwen2ForCausalLM(Qwen2Config(**{key: settings[key] for key in settings if key != "head_dim"})))
    source, qwen2 = save_source(tmp_path / "source", model), load_architecture("qwen2")
    flags = ("--is_dynamic", "True", "--anti_method", "m2", "--target", "mindie")
    assert main(qwen2, convert_flags(source, tmp_path / "out", *flags)) == 1
    assert_one_error_line(capfd.readouterr().err, "gives model.layers.0.mlp.gate_proj, whose architecture has none")
    only_attention = (*flags, "--disable_names", "*.mlp.*")
    assert main(qwen2, convert_flags(source, tmp_path / "out", *only_attention)) == 0


def in_float(directory: Path) -> set[str]:
    """Linears of the layers that are in float, without `.weight`."""
    description = description_of(directory)
    return {
        name.removesuffix(".weight")
        for name, label in description.items()
        if name.endswith("_proj.weight") and label == "FLOAT"
    }


@pytest.mark.parametrize("flags", [("--disable_level", "L8"), ("--fa_amp", "8")])
def test_q_k_and_v_stay_in_float_together(flags: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    """And gate and up; each such unit counts once. A target would refuse anything else."""
    flags = ("--disable_names", "lm_head", *flags, "--target", "mindie")
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *flags)) == 0
    floats = in_float(tmp_path / "out")
    units = [
        tuple(f"model.layers.{layer}.{part}_proj" for part in parts)
        for layer in range(3)
        for parts in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up"))
    ]
    assert all(floats.isdisjoint(unit) or floats.issuperset(unit) for unit in units)
    assert len(grouped(sorted(floats), units)) == 8 < len(floats)


def test_grouped() -> None:
    units = [(Q, K, V), ("gate", "up")]
    assert grouped(["o", "up", V, Q, "down", "gate"], units) == [("o",), ("gate", "up"), (Q, V), ("down",)]


@pytest.mark.parametrize(
    ("config", "stored", "dtype"),
    [
        ({"dtype": "float32"}, "F32", torch.bfloat16),
        ({"dtype": "bfloat16"}, "F32", torch.bfloat16),
        ({"torch_dtype": "float16"}, "BF16", torch.float16),
        ({"dtype": "torch.float16"}, "F16", torch.float16),
        ({}, "F16", torch.float16),
        ({}, "F32", torch.bfloat16),
    ],
)
def test_engines_run_float32_as_bfloat16(config: dict[str, str], stored: str, dtype: torch.dtype) -> None:
    """vLLM's `_resolve_auto_dtype` on a platform whose first dtype is bfloat16."""
    assert engine_dtype(config, stored) == dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_scales_survive_the_dtype_of_engines(dtype: str, tmp_path: Path) -> None:
    """They hold input_scale in the dtype of the model, which deq_scale has to be the product of all the same."""
    source = save_source(tmp_path / "source", tiny_llama().to(getattr(torch, dtype)))
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out")) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    engine = "float16" if dtype == "float16" else "bfloat16"
    assert (config["dtype"], config["torch_dtype"]) == (dtype, engine)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    tensors = quantized_tensors(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj"
    scale, stored = tensors[f"{name}.input_scale"], tensors[f"{name}.deq_scale"]
    assert torch.equal(scale, scale.to(getattr(torch, engine)).float())
    found = stored.to(torch.int32).view(torch.float32) if dtype == "float16" else stored
    assert stored.dtype == (torch.int64 if dtype == "float16" else torch.float32)
    assert torch.equal(found, scale * tensors[f"{name}.weight_scale"].flatten())


LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_llama_31_keeps_its_scaling_in_every_reader(tmp_path: Path) -> None:
    """transformers 4 and MindIE read `rope_scaling` and `rope_theta`; 5 takes the former for `rope_parameters`."""
    source = save_source(tmp_path / "source", tiny_llama(rope_parameters=LLAMA_31))
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out", *C8)) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == LLAMA_31 and config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {name: value for name, value in LLAMA_31.items() if name != "rope_theta"}
    loaded, before = (AutoConfig.from_pretrained(tmp_path / name) for name in ("out", "source"))
    assert loaded.rope_parameters == before.rope_parameters == LLAMA_31
    rotary, expected = (
        model.base_model.rotary_emb.inv_freq
        for model in (LlamaForCausalLM.from_pretrained(tmp_path / "out"), tiny_llama(rope_parameters=LLAMA_31))
    )
    assert torch.equal(rotary, expected)


def test_two_scalings_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = save_source(tmp_path / "source", tiny_llama(rope_parameters=LLAMA_31))
    file = source / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rope_scaling": {**LLAMA_31, "factor": 4.0}}))
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out")) == 1
    assert_one_error_line(capfd.readouterr().err, "rope_scaling, which takes the place of rope_parameters")


def test_a_scaling_that_says_nothing_is_none(tmp_path: Path) -> None:
    """transformers takes an empty `rope_scaling` for none, too."""
    source = save_source(tmp_path / "source", tiny_llama(rope_parameters=LLAMA_31))
    file = source / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rope_scaling": {}}))
    assert main(ARCHITECTURE, convert_flags(source, tmp_path / "out")) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_scaling"]["factor"] == LLAMA_31["factor"]


def _in_two_kinds() -> Layout:
    """Linears in int8, and the last of the MLP in int4."""
    config = ct_config("pack-quantized", args(8, "int", "channel"))
    config["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": args(4, "int", "group")}
    return Layout(lambda w: packed_ct(w) if w.shape[1] == 128 else packed_ct(w, bits=8, group=0), config)


EIGHT_WITH_ZEROS = ct_config("pack-quantized", args(8, "int", "channel", False))
WIDE = args(8, "int", "group", group_size=96)
CODED = [
    (
        "vllm-ascend",
        _in_two_kinds(),
        {},
        "has no linears of W4A16; give one of W8A8, W8A8_DYNAMIC, W8A16, W8A8_MIX (--pdmix True), "
        "W8A8FP8_DYNAMIC (--quantization fp8); --requantize",
    ),
    (
        "mindie",
        Layout(partial(packed_ct, bits=8, group=96), ct_config("pack-quantized", WIDE)),
        {"hidden_size": 192, "intermediate_size": 192, "head_dim": 48},
        "reads W8A16 by --group_size 0, 64, 128, 256, not 96; --requantize makes others of those of the source",
    ),
    (
        "vllm-ascend",
        Layout(partial(packed_ct, bits=8, group=0, symmetric=False), EIGHT_WITH_ZEROS),
        {},
        "which are stored to be taken off, as MindIE does; --requantize makes others",
    ),
]


@pytest.mark.parametrize(("target", "layout", "sizes", "reason"), CODED)
def test_codes_of_a_source_that_an_engine_cannot_read_are_refused(
    target: str, layout: Layout, sizes: dict[str, int], reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of every kind that there is, and groups of any size."""
    write_coded(tmp_path / "source", layout, **sizes)
    assert main(ARCHITECTURE, convert_flags(tmp_path / "source", tmp_path / "out", "--target", target)) == 1
    assert_one_error_line(capfd.readouterr().err, f"--target {target}: ", reason)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose first and last layers have four experts."""
    return save_source(tmp_path_factory.mktemp("experts") / "source", tiny_moe())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ("--disable_names", "lm_head"),
            "has no experts of W8A8, which model.layers.0.mlp.experts.0.gate_proj is; give",
        ),
        (("--a_bit", "16"), "has no experts of W8A16"),
        (
            ("--is_dynamic", "True", "--disable_names", "*.experts.3.down_proj"),
            "and model.layers.0.mlp.experts.0.gate_proj as one, and only one of them is quantized; name all 12",
        ),
    ],
)
def test_experts_are_read_of_fewer_kinds_and_as_one(
    flags: tuple[str, ...], reason: str, experts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--target", "vllm-ascend", *flags)
    assert main(load_architecture("qwen3_moe"), convert_flags(experts, tmp_path / "out", *flags)) == 1
    assert_one_error_line(capfd.readouterr().err, "--target vllm-ascend: vllm-ascend ", reason)


@pytest.mark.parametrize("flags", [("--disable_level", "L5"), ("--fa_amp", "5")])
def test_experts_of_a_layer_stay_in_float_together(flags: tuple[str, ...], experts: Path, tmp_path: Path) -> None:
    flags = ("--is_dynamic", "True", "--disable_names", "lm_head", *flags, "--target", "vllm-ascend")
    assert main(load_architecture("qwen3_moe"), convert_flags(experts, tmp_path / "out", *flags)) == 0
    floats = in_float(tmp_path / "out")
    counts = [len([name for name in floats if name.startswith(f"model.layers.{n}.mlp.experts.")]) for n in (0, 2)]
    assert set(counts) <= {0, 12} and 12 in counts
