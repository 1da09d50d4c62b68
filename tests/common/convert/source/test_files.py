"""What a conversion reads of a source is what transformers reads of it: files, ties, config.json."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from octavo.common.architecture import stated_architectures
from octavo.common.convert.api import main
from octavo.common.convert.source.checkpoint import read_source_headers, source_files
from octavo.common.convert.source.config import load_source_config, read_source_config
from octavo.common.errors import OctavoError
from octavo.models.llama3 import ARCHITECTURE
from octavo.models.qwen2 import ARCHITECTURE as QWEN2

from ....support import (
    REPOSITORY,
    assert_one_error_line,
    convert_flags,
    edit_json,
    random_ids,
    save_source,
    tiny_llama,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ALMOST_FLOAT = ("--w_bit", "16", "--a_bit", "16", "--scheme", "int8-token")


@pytest.fixture
def made(source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return shutil.copytree(source, tmp_path / "made")


def shard(directory: Path, parts: int = 2, factor: float = 1.0) -> None:
    """Add an index, and files that it lists with the weights times a factor."""
    tensors, places = load_file(directory / "model.safetensors"), {}
    for part in range(parts):
        names = sorted(tensors)[part::parts]
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        save_file({name: tensors[name] * factor for name in names}, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def scale(directory: Path, name: str, factor: float = 1.7) -> None:
    """A file of the checkpoint's tensors times a factor."""
    tensors = load_file(directory / "model.safetensors")
    save_file({n: t * factor for n, t in tensors.items()}, directory / name, metadata={"format": "pt"})


def kl_from_transformers(directory: Path, target: Path, *flags: str) -> float:
    """How far the output is from what transformers loads of the source."""
    assert main(ARCHITECTURE, convert_flags(directory, target, *ALMOST_FLOAT, *flags)) == 0
    ids = random_ids(1, 40)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory)(ids).logits.double().log_softmax(-1)
        found = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)(ids).logits.double()
    return float((expected.exp() * (expected - found.log_softmax(-1))).sum(-1).mean())


def named(directory: Path) -> None:
    """Weights under the name that config.json gives them, beside others under the usual one."""
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    shutil.copyfile(directory / "weights.safetensors", directory / "model.safetensors")
    scale(directory, "model.safetensors")
    edit_json(directory / "config.json", transformers_weights="weights.safetensors")


def only_index(directory: Path) -> None:
    shard(directory)
    (directory / "model.safetensors").unlink()


DIRECTORIES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a backup beside it": (lambda d: scale(d, "model_old.safetensors"), ["model.safetensors"]),
    "a variant beside it": (lambda d: scale(d, "model.fp16.safetensors"), ["model.safetensors"]),
    "a stale index beside it": (lambda d: shard(d, factor=1.7), ["model.safetensors"]),
    "a broken index beside it": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        ["model.safetensors"],
    ),
    "an index alone": (only_index, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
    "another name in config.json": (named, ["weights.safetensors"]),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_the_weights_are_those_that_transformers_loads(name: str, made: Path, tmp_path: Path) -> None:
    change, files = DIRECTORIES[name]
    change(made)
    assert [file.name for file in source_files(made)] == files
    assert kl_from_transformers(made, tmp_path / "out") < 0.01


def listing(directory: Path, file: str) -> None:
    """An index that lists one file, and no other weights."""
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": file}}))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a backup alone": (
        lambda d: (d / "model.safetensors").rename(d / "model_old.safetensors"),
        r"model_old.safetensors is none of them",
    ),
    "a file elsewhere": (lambda d: listing(d, "../model.safetensors"), r"names \.\./model.safetensors, which lies out"),
    "an absolute path": (lambda d: listing(d, "/model.safetensors"), r"names /model.safetensors, which lies outside"),
    "a folder that leads out": (lambda d: listing(d, "a/../../b.safetensors"), "lies outside"),
    "an empty index": (lambda d: listing(d, ""), r"is missing|maps no tensors"),
    "a name that is none": (
        lambda d: edit_json(d / "config.json", transformers_weights="a.bin"),
        "names no safe",
    ),
    "a name elsewhere": (
        lambda d: edit_json(d / "config.json", transformers_weights="../a.safetensors"),
        "lies outside",
    ),
    "an adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "adds an adapter"),
    "a distributed checkpoint": (
        lambda d: (d / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b""),
        "distributed checkpoint",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_would_not_read_or_not_alone_is_refused(name: str, made: Path) -> None:
    change, part = REFUSED[name]
    change(made)
    with pytest.raises(OctavoError, match=part):
        read_source_headers(made)


def ties(head: str | None, embedding: str | None, says: bool = True) -> Callable[[Path], None]:
    """Change weights of head and embedding ("own", "same" as the other's; None: not stored), and what config says."""

    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        stored = {"head": tensors.pop("lm_head.weight"), "embedding": tensors.pop("model.embed_tokens.weight")}
        if head is not None:
            tensors["lm_head.weight"] = stored["embedding" if head == "same" else "head"].clone()
        if embedding is not None:
            tensors["model.embed_tokens.weight"] = stored["embedding"]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        edit_json(directory / "config.json", tie_word_embeddings=says)

    return change


TIES = {
    "both and they differ": (ties("own", "own"), False),
    "both and they are equal": (ties("same", "own"), True),
    "the embedding alone": (ties(None, "own"), True),
    "the head alone": (ties("own", None), True),
    "not tied": (ties("own", "own", says=False), False),
}


@pytest.mark.parametrize("name", TIES)
@pytest.mark.parametrize("flags", [(), ("--w_bit", "8", "--disable_last_linear", "False")])
def test_ties_are_those_that_transformers_decides(
    name: str, flags: tuple[str, ...], made: Path, tmp_path: Path
) -> None:
    change, is_tied = TIES[name]
    change(made)
    assert kl_from_transformers(made, tmp_path / "out", *flags) < 0.01
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (is_tied and not flags)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (ties(None, None), "vocab_size is 320, and no stored tensor is wider"),
        (ties(None, "own", says=False), "missing keys: lm_head.weight"),
        (ties("own", None, says=False), "missing keys: model.embed_tokens.weight"),
    ],
)
def test_half_a_tie_is_refused(
    change: Callable[[Path], None], part: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(made)
    assert main(ARCHITECTURE, convert_flags(made, tmp_path / "out", *ALMOST_FLOAT)) == 1
    assert_one_error_line(capsys.readouterr().err, part)


NOT_BORNE: dict[str, Any] = {
    "_attn_implementation": "sdpa",
    "attn_implementation": {"": "eager"},
    "_attn_implementation_internal": "sdpa",
    "output_attentions": True,
    "quantization_config": None,
    "torchscript": True,
    "pruned_heads": {"0": [1]},
    "custom_pipelines": {"text": {"impl": "pipeline.Text"}},
}
BORNE: dict[str, Any] = {"use_cache": False, "cache_implementation": "quantized", "output_hidden_states": True}


@pytest.mark.parametrize("key", [*NOT_BORNE, *BORNE])
def test_config_json_has_what_the_output_can_bear(key: str, made: Path, tmp_path: Path) -> None:
    config = json.loads((made / "config.json").read_text()) | {key: (NOT_BORNE | BORNE)[key]}
    (made / "config.json").write_text(json.dumps(config))
    assert kl_from_transformers(made, tmp_path / "out") < 0.01
    assert (key in json.loads((tmp_path / "out" / "config.json").read_text())) == (key in BORNE)


def test_an_attention_that_is_not_installed_is_no_matter(made: Path, tmp_path: Path) -> None:
    edit_json(made / "config.json", _attn_implementation="flash_attention_2", auto_map={"AutoConfig": "own.Config"})
    assert main(ARCHITECTURE, convert_flags(made, tmp_path / "out", *ALMOST_FLOAT)) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == ARCHITECTURE.auto_map


def test_attention_that_is_not_causal_is_refused(made: Path) -> None:
    edit_json(made / "config.json", is_causal=False)
    with pytest.raises(OctavoError, match="is_causal is false"):
        read_source_config(made, ARCHITECTURE)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "cuda", "of somebody"])
def test_a_dtype_that_no_model_has_is_refused(dtype: str, made: Path) -> None:
    edit_json(made / "config.json", dtype=dtype)
    with pytest.raises(OctavoError, match=r"dtype is|cannot be loaded"):
        load_source_config(made)


@pytest.mark.parametrize(
    ("model_type", "part"),
    [("qwen3", "run models/qwen3/convert_quant_weights.py"), ("gpt2", "the zoo has none for it")],
)
def test_the_wrong_script_names_the_right_one(model_type: str, part: str, made: Path) -> None:
    edit_json(made / "config.json", model_type=model_type)
    with pytest.raises(OctavoError, match=part):
        read_source_config(made, QWEN2)


def test_the_zoo_states_what_it_converts() -> None:
    folders = {file.parent.name for file in (REPOSITORY / "models").glob("*/convert_quant_weights.py")}
    assert set(stated_architectures().values()) == folders
    assert stated_architectures()[ARCHITECTURE.model_type] == ARCHITECTURE.name


GENERATION = {
    "do_sample": True,
    "temperature": 0.3,
    "of_somebody": 1,
    "cache_implementation": "quantized",
    "custom_generate": "somebody/code",
}


def test_the_config_of_generation_is_carried_without_code_and_caches(made: Path, tmp_path: Path) -> None:
    (made / "generation_config.json").write_text(json.dumps(GENERATION))
    assert main(ARCHITECTURE, convert_flags(made, tmp_path / "out", *ALMOST_FLOAT)) == 0
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {"do_sample": True, "temperature": 0.3, "of_somebody": 1}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.generate(random_ids(1, 5), max_new_tokens=3).shape == (1, 8)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_config_of_generation_is_named_before_the_first_layer(
    content: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / "generation_config.json").write_text(content)
    assert main(ARCHITECTURE, convert_flags(made, tmp_path / "out", *ALMOST_FLOAT)) == 1
    captured = capsys.readouterr().err
    assert_one_error_line(captured, "generation_config.json", "mend or remove it")
    assert "converting" not in captured and [file.name for file in tmp_path.iterdir()] == ["made"]


def test_files_of_a_base_model_have_no_prefix(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    directory = save_source(tmp_path / "made", model)
    tensors = load_file(directory / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, directory / "model.safetensors", metadata={"format": "pt"})
    assert kl_from_transformers(directory, tmp_path / "out") < 0.01
