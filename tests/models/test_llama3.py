"""Converted Llama directories as a user gets them: loaded by transformers, with Octavo not installed."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.common.convert import api as conversion
from octavo.models.llama3 import ARCHITECTURE, float_linears
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ..metrics import rmse_in_std
from ..support import convert_flags, edit_json, random_ids, run_python, save_source, tiny_config, tiny_llama
from ..tolerances import TOLERANCES
from .loading import environment, load_without_octavo, save_expected

pytestmark = pytest.mark.usefixtures("one_thread")

C8, FA = ("--use_kvcache_quant", "True"), ("--use_fa_quant", "True")
DYNAMIC = ("--is_dynamic", "True")
FLOAT_LINEARS = ("--w_bit", "16", "--a_bit", "16")
SHARDED = ("--part_file_size", "1")

VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "c8 w8a8": ({}, C8),
    "c8 float linears": ({}, (*C8, *FLOAT_LINEARS)),
    "fa w8a8": ({}, FA),
    "fa float linears": ({}, (*FA, *FLOAT_LINEARS)),
    "w8a8 alone": ({}, ()),
    "c8 tied": ({"tie_word_embeddings": True}, C8),
    "fa tied float linears": ({"tie_word_embeddings": True}, (*FA, *FLOAT_LINEARS)),
    "c8 tied, lm_head quantized": ({"tie_word_embeddings": True}, (*C8, "--disable_last_linear", "False")),
    "c8 dynamic tied, lm_head quantized": (
        {"tie_word_embeddings": True},
        (*C8, *DYNAMIC, "--disable_last_linear", "False"),
    ),
    "dynamic alone, bf16, biases": ({"dtype": "bfloat16", "attention_bias": True}, DYNAMIC),
    "c8 sharded": ({}, (*C8, *SHARDED)),
    "fa tied sharded": ({"tie_word_embeddings": True}, (*FA, *SHARDED)),
    "c8 bf16": ({"dtype": "bfloat16"}, C8),
    "fa bf16 sharded": ({"dtype": "bfloat16"}, (*FA, *SHARDED)),
    "c8 fp16": ({"dtype": "float16"}, C8),
    "c8 with biases": ({"attention_bias": True, "mlp_bias": True}, C8),
    "fa with biases, float linears": ({"attention_bias": True}, (*FA, *FLOAT_LINEARS)),
}
"""Name to changes of the tiny Llama and flags of the conversion."""


def as_snapshot(
    directory: Path, cache: Path, name: str, revision: str = "0123456789abcdef0123456789abcdef01234567"
) -> str:
    """Lay a directory out as the hub library keeps a fetched model; returns its hub id."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / "hub" / f"models--octavo-tests--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    shutil.copytree(directory, folder / "snapshots" / revision)
    return f"octavo-tests/{name}"


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every variant, converted into a directory whose path has spaces."""
    made = {}
    root = tmp_path_factory.mktemp("models with spaces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.common.convert.run.GIGABYTE", 100_000)
        for name, (changes, flags) in VARIANTS.items():
            dtype = getattr(torch, changes.get("dtype", "float32"))
            model = tiny_llama(**{k: v for k, v in changes.items() if k != "dtype"}).to(dtype)
            source = save_source(root / f"source of {name}", model)
            assert conversion.main(ARCHITECTURE, convert_flags(source, root / name, *flags)) == 0
            made[name] = root / name
    return made


@pytest.fixture(scope="module")
def expected(variants: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Logits and tokens of every variant, from the model in this tree."""
    folder = tmp_path_factory.mktemp("expected")
    files = {}
    for name, directory in variants.items():
        files[name] = folder / f"{len(files)}.safetensors"
        save_expected(LlamaForCausalLM.from_pretrained(directory), files[name])
    return files


def test_every_variant_loads_from_a_path_bit_for_bit(
    variants: dict[str, Path], expected: dict[str, Path], tmp_path: Path
) -> None:
    rows = [(name, str(directory), str(expected[name])) for name, directory in variants.items()]
    found = load_without_octavo(rows, tmp_path)
    dtypes = {name: "torch." + changes.get("dtype", "float32") for name, (changes, _) in VARIANTS.items()}
    assert found == {name: [True, True, True, dtypes[name]] for name in variants}


def test_every_variant_loads_from_an_offline_snapshot_bit_for_bit(
    variants: dict[str, Path], expected: dict[str, Path], tmp_path: Path
) -> None:
    chosen = ["c8 w8a8", "fa float linears", "c8 tied", "c8 sharded", "fa tied sharded", "c8 bf16"]
    rows = [
        (name, as_snapshot(variants[name], tmp_path, name.replace(" ", "-")), str(expected[name])) for name in chosen
    ]
    found = load_without_octavo(rows, tmp_path)
    assert {name: row[:3] for name, row in found.items()} == {name: [True, True, True] for name in chosen}


def test_two_versions_of_the_code_live_in_one_process(
    variants: dict[str, Path], expected: dict[str, Path], tmp_path: Path
) -> None:
    """The second copy has another digest, and attention and layers that do nothing, so a mix-up would be seen."""
    other = tmp_path / "other version"
    shutil.copytree(variants["c8 w8a8"], other)
    runtime = other / "octavo_runtime.py"
    text = runtime.read_text()
    namespace = text.split('NAMESPACE = "')[1].split('"')[0]
    assert namespace.startswith("octavo_") and len(namespace) == len("octavo_") + 12
    broken = text.replace(namespace, "octavo_ffffffffffff").replace(
        "    return attention(*ATTENTION_CALL", "    return 0 * attention(*ATTENTION_CALL"
    )
    broken = broken.replace("return _ATTEND_CPU(call)", "return 0 * _ATTEND_CPU(call)")
    broken = broken.replace(
        "        decoder_layers_cpu(call, ", "        call.hidden.zero_(), decoder_layers_cpu(call, "
    )
    assert [broken.count(part) for part in ("0 * attention", "0 * _ATTEND_CPU", "hidden.zero_()")] == [1, 1, 1]
    runtime.write_text(broken)
    rows = [
        ("first", str(variants["c8 w8a8"]), str(expected["c8 w8a8"])),
        ("other", str(other), str(expected["c8 w8a8"])),
        ("first again", str(variants["c8 w8a8"]), str(expected["c8 w8a8"])),
        ("fa", str(variants["fa w8a8"]), str(expected["fa w8a8"])),
    ]
    found = load_without_octavo(rows, tmp_path)
    assert {name: row[0] for name, row in found.items()} == {
        "first": True,
        "other": False,
        "first again": True,
        "fa": True,
    }


LOAD_NATIVE = """
import json, sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
messages = []
for directory in sys.argv[1:]:
    for load, arguments in (
        (AutoModelForCausalLM, {"trust_remote_code": False}),
        (AutoModelForCausalLM, {}),
        (LlamaForCausalLM, {}),
    ):
        try:
            load.from_pretrained(directory, **arguments)
            messages.append(f"{directory} loaded with {arguments}")
        except Exception as error:
            messages.append(str(error))
print(json.dumps(messages))
"""


def test_a_load_without_remote_code_fails_and_says_why(variants: dict[str, Path], tmp_path: Path) -> None:
    chosen = [str(variants[name]) for name in ("c8 w8a8", "c8 float linears", "c8 sharded", "c8 tied")]
    messages = run_python(LOAD_NATIVE, *chosen, environment=environment(tmp_path))
    assert len(messages) == 12
    for message in messages:
        assert "trust_remote_code" in message


def test_sharded_directories_hold_several_files_and_an_index(variants: dict[str, Path]) -> None:
    for name in ("c8 sharded", "fa tied sharded", "fa bf16 sharded"):
        files = sorted(file.name for file in variants[name].glob("quant_model_weight_w8a8*"))
        assert len(files) > 2 and files[0].startswith("quant_model_weight_w8a8-00001-of-0000")
        index = json.loads((variants[name] / "quant_model_weight_w8a8.safetensors.index.json").read_text())
        stored = {file: set(load_file(variants[name] / file)) for file in files if not file.endswith(".json")}
        assert {tensor: file for file, tensors in stored.items() for tensor in tensors} == index["weight_map"]
        sizes = [sum(t.nbytes for t in load_file(variants[name] / file).values()) for file in stored]
        assert index["metadata"]["total_size"] == sum(sizes)
        assert all(size <= 100_000 or len(stored[file]) == 1 for size, file in zip(sizes, stored, strict=True))


def test_a_sharded_conversion_has_the_tensors_of_a_single_file(variants: dict[str, Path]) -> None:
    single = load_file(variants["c8 w8a8"] / "quant_model_weight_w8a8.safetensors")
    parts: dict[str, torch.Tensor] = {}
    for file in variants["c8 sharded"].glob("*.safetensors"):
        parts.update(load_file(file))
    assert parts.keys() == single.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in single.items())


def test_biases_reach_the_quantized_model(variants: dict[str, Path]) -> None:
    model = LlamaForCausalLM.from_pretrained(variants["c8 with biases"])
    ids = random_ids(1, 30)
    with torch.inference_mode():
        expected = tiny_llama(attention_bias=True, mlp_bias=True)(ids).logits
        error = rmse_in_std(model(ids).logits, expected)
        for name, buffer in model.named_buffers():
            if name.endswith("quant_bias"):
                buffer.add_(3000)
        broken = rmse_in_std(model(ids).logits, expected)
    assert error < 0.1 < broken


def test_the_class_loads_an_ordinary_checkpoint_as_float(source: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(source).eval()
    ids = random_ids(2, 30)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, tiny_llama()(ids).logits, atol=1e-4, rtol=1e-4)
    assert model.scheme.name == "float"


def test_static_and_dynamic_linears_live_in_one_directory(
    variants: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    """As msmodelslim writes them for recipes that mix both."""
    mixed, static = tmp_path / "mixed", variants["c8 w8a8"]
    assert conversion.main(ARCHITECTURE, convert_flags(source, mixed, *C8, *DYNAMIC)) == 0
    file, description = mixed / "quant_model_weight_w8a8_dynamic.safetensors", "quant_model_description.json"
    tensors, labels = load_file(file), json.loads((mixed / description).read_text())
    static_labels = json.loads((static / description).read_text())
    for name, tensor in load_file(static / "quant_model_weight_w8a8.safetensors").items():
        if ".q_proj." in name:
            tensors[name], labels[name] = tensor, static_labels[name]
    save_file(tensors, file, metadata={"format": "pt"})
    (mixed / description).write_text(json.dumps(labels))
    model = LlamaForCausalLM.from_pretrained(mixed).eval()
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.LABEL, attention.k_proj.LABEL) == ("W8A8", "W8A8_DYNAMIC")
    ids = random_ids(1, 30)
    with torch.inference_mode():
        expected = tiny_llama()(ids).logits
        error = rmse_in_std(model(ids).logits, expected)
    assert error < TOLERANCES["rmse of a tiny model, W8A8"]


def test_config_of_the_output(variants: dict[str, Path]) -> None:
    config = json.loads((variants["c8 w8a8"] / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_llama_fa3.LlamaForCausalLM"}
    assert config["octavo"]["scheme"]["name"] == "ascend-c8"
    assert config["model_type"] == "llama" and config["hidden_size"] == 64
    assert config["rope_theta"] == 10000.0, "where readers built on transformers 4 look for it"
    untied = json.loads((variants["c8 tied, lm_head quantized"] / "config.json").read_text())
    assert untied["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("changes", "dtype", "floats"),
    [
        ({}, torch.float16, ["*.mlp.down_proj", "lm_head"]),
        ({"hidden_size": 8192}, torch.bfloat16, ["*.mlp.down_proj", "lm_head"]),
        ({"hidden_size": 8192}, torch.float16, [f"model.layers.{i}.*_proj" for i in range(5)] + ["lm_head"]),
        (
            {"hidden_size": 8192, "max_position_embeddings": 131072},
            torch.float16,
            [f"model.layers.{i}.*_proj" for i in range(5)] + ["*.mlp.down_proj", "lm_head"],
        ),
    ],
)
def test_recipe_of_ascend(changes: dict[str, Any], dtype: torch.dtype, floats: list[str]) -> None:
    assert float_linears(tiny_config(num_attention_heads=64, head_dim=128, **changes), dtype) == floats


def test_the_recipe_is_told_the_dtype_of_the_checkpoint_and_not_of_the_calculation(tmp_path: Path) -> None:
    told = []

    def recipe(config: Any, dtype: torch.dtype) -> list[str]:
        told.append(dtype)
        return float_linears(config, dtype)

    source = save_source(tmp_path / "half", tiny_llama().half())
    architecture = dataclasses.replace(ARCHITECTURE, float_linears=recipe)
    assert conversion.main(architecture, convert_flags(source, tmp_path / "out")) == 0
    assert told == [torch.float16]


SAME_CODE_TWICE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
first, second = (AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True) for path in sys.argv[1:])
ids = torch.arange(3, 40)[None]
with torch.inference_mode():
    print(json.dumps([torch.equal(first(ids).logits, second(ids).logits), type(first) is type(second)]))
"""


def test_two_checkpoints_with_the_same_code_run_in_turns(variants: dict[str, Path], tmp_path: Path) -> None:
    """transformers makes a module of its own from each directory, and both register under the same digest."""
    copy = shutil.copytree(variants["c8 w8a8"], tmp_path / "a copy")
    assert run_python(SAME_CODE_TWICE, str(variants["c8 w8a8"]), str(copy)) == [True, False]


def test_a_hand_edited_scheme_is_used(variants: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "edited"
    shutil.copytree(variants["c8 w8a8"], directory)
    scheme = json.loads((directory / "config.json").read_text())["octavo"]["scheme"]
    edit_json(directory / "config.json", octavo={"scheme": {**scheme, "prefill": "float"}})
    assert LlamaForCausalLM.from_pretrained(directory).scheme.prefill == "float"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [C8, FA], ids=["c8", "fa"])
def test_a_real_model_converts_and_loads(
    flags: tuple[str, ...], smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "smollm2 quantized"
    assert conversion.main(ARCHITECTURE, convert_flags(smollm2, target, *flags)) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("KL"))
    assert float(row.split()[-1]) < 0.3
    model = LlamaForCausalLM.from_pretrained(target).eval()
    assert (
        len(model.scheme.of_layer(0).to_dict()) > 0 and model.scheme.name == f"ascend-{'c8' if flags == C8 else 'fa'}"
    )
