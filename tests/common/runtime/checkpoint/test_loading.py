"""Loads of directories that came to harm: one line names what, before anything of the stated sizes is allocated."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.common.convert import api as conversion
from octavo.common.errors import OctavoError
from octavo.models.llama3 import ARCHITECTURE
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ....support import any_of, convert_flags, edit_json

pytestmark = pytest.mark.usefixtures("one_thread")

C8 = ("--use_kvcache_quant", "True")
DESCRIPTION, CONFIG, GENERATION = "quant_model_description.json", "config.json", "generation_config.json"
INDEX = "quant_model_weight_w8a8.safetensors.index.json"
DEEP = '{"a":' * 10_000 + "1" + "}" * 10_000


def copied(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target))


def refusal(directory: Path) -> str:
    """What the error of a load says, which is one line."""
    with pytest.raises(OctavoError) as caught:
        LlamaForCausalLM.from_pretrained(directory)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


SIZES = [
    ("head_dim", 10**9),
    ("head_dim", 24),
    ("num_hidden_layers", 10**6),
    ("num_hidden_layers", 4000),
    ("num_hidden_layers", 0),
    ("vocab_size", 10**12),
    ("vocab_size", "many"),
    ("vocab_size", -320),
    ("hidden_size", 10**7),
    ("hidden_size", None),
    ("intermediate_size", 10**9),
    ("intermediate_size", 96),
    ("num_key_value_heads", 4096),
    ("num_attention_heads", 2.5),
    ("num_attention_heads", [4]),
]


@pytest.mark.parametrize("kind", ["converted", "ordinary"])
@pytest.mark.parametrize(("name", "value"), SIZES, ids=str)
def test_sizes_that_are_not_those_of_the_weights(
    kind: str, name: str, value: Any, source: Path, converted: Callable[..., Path], tmp_path: Path
) -> None:
    directory = copied(converted(*C8) if kind == "converted" else source, tmp_path / "damaged")
    data = {**json.loads((directory / CONFIG).read_text()), name: value}
    (directory / CONFIG).write_text(json.dumps(data))
    assert "config.json" in (message := refusal(directory)) and (name in message or "is stored as" in message)


TEXTS = [
    (CONFIG, "[]", "no JSON object"),
    (CONFIG, DEEP, "nested too deeply"),
    (CONFIG, "{", "cannot be read"),
    (CONFIG, "{}", "no config of a model"),
    (DESCRIPTION, DEEP, "nested too deeply"),
    (DESCRIPTION, '{"a.weight": "FLOAT", "a.weight": "FLOAT"}', "stands there twice"),
    (GENERATION, "{", "cannot be read"),
    (GENERATION, "[]", "no JSON object"),
    (GENERATION, '{"max_new_tokens": "many"}', "cannot be used"),
]


@pytest.mark.parametrize(("file", "text", "part"), TEXTS, ids=[f"{f} {t[:20]}" for f, t, _ in TEXTS])
def test_files_that_hold_something_else(
    file: str, text: str, part: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    directory = copied(converted(*C8), tmp_path / "damaged")
    (directory / file).write_text(text)
    message = refusal(directory)
    assert file in message and part in message


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 10000.0}},
        {"rope_parameters": [1]},
        {"rope_theta": 500000.0},
        {"rms_norm_eps": None},
        {"rms_norm_eps": 0.0},
        {"hidden_act": "nonsense"},
        {"hidden_act": 5},
        {"rms_norm_eps": float("nan")},
        {"dtype": "float3"},
        {"dtype": 2},
        {"octavo": {"scheme": "mine.json"}},
        {"octavo": {"scheme": ["float"]}},
        {"octavo": {"scheme": {"name": "x", "layers": {"0-999999999": "float"}}}},
        {"octavo": {"scheme": {"name": "x", "sinks": 10**18}}},
    ],
    ids=str,
)
def test_settings_that_are_none(changes: dict[str, Any], converted: Callable[..., Path], tmp_path: Path) -> None:
    directory = copied(converted(*C8), tmp_path / "damaged")
    edit_json(directory / CONFIG, **changes)
    assert str(directory) in refusal(directory) or "scheme" in refusal(directory)


@pytest.mark.parametrize(
    "label", [5, ["W8A8"], {"a": "W8A8"}, True, 10**30, "w8a8", "x" * 10**5], ids=lambda x: str(x)[:9]
)
def test_labels_that_are_none(label: Any, converted: Callable[..., Path], tmp_path: Path) -> None:
    directory = copied(converted(*C8), tmp_path / "damaged")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_json(directory / DESCRIPTION, **{name: label})
    assert name in refusal(directory)


@pytest.fixture(scope="module")
def sharded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("sharded") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.common.convert.run.GIGABYTE", 100_000)
        assert conversion.main(ARCHITECTURE, convert_flags(source, target, *C8, "--part_file_size", "1")) == 0
    return target


def remap(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


NORM = "model.norm.weight"
INDEXES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a number": (lambda d: remap(d, lambda m: m.update({NORM: 5})), "lies in 5"),
    "a path": (lambda d: remap(d, lambda m: m.update({NORM: "../elsewhere.safetensors"})), "no file of this directory"),
    "the directory": (lambda d: remap(d, lambda m: m.update({NORM: ".."})), "no file of this directory"),
    "a file that is missing": (lambda d: remap(d, lambda m: m.update({NORM: "a.safetensors"})), "missing"),
    "another shard": (
        lambda d: remap(d, lambda m: m.update({NORM: min(name for name in m.values() if name != m[NORM])})),
        NORM,
    ),
    "a tensor left out": (lambda d: remap(d, lambda m: m.pop(NORM)), f"says nothing of {NORM}"),
    "a tensor too many": (lambda d: remap(d, lambda m: m.update({"foo": m[NORM]})), "foo is not stored"),
    "no map": (lambda d: edit_json(d / INDEX, weight_map=[1]), "maps no tensors"),
    "metadata of a list": (lambda d: edit_json(d / INDEX, metadata=[1]), "maps no tensors"),
}


@pytest.mark.parametrize("damage", INDEXES)
def test_indexes_that_are_none(damage: str, sharded: Path, tmp_path: Path) -> None:
    change, part = INDEXES[damage]
    directory = copied(sharded, tmp_path / "damaged")
    change(directory)
    message = refusal(directory)
    assert INDEX in message and part in message


KINDS = {
    "static": C8,
    "fa": ("--use_fa_quant", "True", "--w_bit", "16", "--a_bit", "16"),
    "w4": ("--w_bit", "4", "--a_bit", "16", "--group_size", "32", "--w_sym", "False"),
    "mixed": ("--quantization", "w8a8_mixed", "--scheme", "kvquant-2"),
    "fp8": ("--quantization", "fp8", "--scheme", "vllm-fp8"),
}
VALUES: list[tuple[str, str, float | int]] = [
    ("static", "embed_tokens.weight", float("inf")),
    ("static", "lm_head.weight", float("nan")),
    ("static", "mlp.down_proj.weight", float("-inf")),
    ("static", "input_layernorm.weight", float("nan")),
    ("static", "weight_scale", -1.0),
    ("static", "weight_offset", 1.0),
    ("static", "input_scale", 0.0),
    ("static", "input_offset", 200.0),
    ("static", "input_offset", 0.5),
    ("static", "deq_scale", 2**40 + 1),
    ("static", "deq_scale", 0),
    ("static", "kv_cache_scale", float("inf")),
    ("static", "kv_cache_offset", 300.0),
    ("static", "kv_cache_offset", 1.5),
    ("fa", "fa_q.scale", 0.0),
    ("fa", "fa_q.offset", 3),
    ("w4", "weight_offset", 9.0),
    ("w4", "weight_offset", 0.25),
    ("mixed", "outlier_columns", -1),
    ("mixed", "outlier_columns", 10**6),
    ("mixed", "outlier_weight", float("nan")),
    ("mixed", "octavo_cache.key_levels", 1e9),
    ("mixed", "octavo_cache.key_zero", 1e38),
    ("fp8", "octavo_cache.key_scale", -1.0),
    ("fp8", "q_proj.weight", float("nan")),
]


@pytest.mark.parametrize(("kind", "part", "value"), VALUES, ids=str)
def test_values_that_no_tensor_has(
    kind: str, part: str, value: float, converted: Callable[..., Path], tmp_path: Path
) -> None:
    directory = copied(converted(*KINDS[kind]), tmp_path / "damaged")
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    name = any_of(tensors, part)
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    message = refusal(directory)
    assert str(directory) in message and name.rpartition(".")[0] in message


def test_nan_in_an_ordinary_checkpoint(source: Path, tmp_path: Path) -> None:
    directory = copied(source, tmp_path / "damaged")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][100, 63] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.2.mlp.up_proj.weight holds NaN or Inf" in refusal(directory)


def test_columns_that_stand_there_twice(converted: Callable[..., Path], tmp_path: Path) -> None:
    directory = copied(converted(*KINDS["mixed"]), tmp_path / "damaged")
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    columns = tensors[any_of(tensors, "outlier_columns")]
    columns[1] = columns[0]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "outlier_columns" in refusal(directory)


def test_a_load_in_another_dtype_is_checked_too(converted: Callable[..., Path]) -> None:
    assert LlamaForCausalLM.from_pretrained(converted(*C8), dtype=torch.bfloat16).dtype == torch.bfloat16
