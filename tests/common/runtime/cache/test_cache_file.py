"""A cache that is saved comes back bit for bit, in another process too, and what is no such file is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from octavo.common.errors import OctavoError
from octavo.common.runtime.cache.cache_file import CACHE_FORMAT
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import Scheme, load_scheme
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ....support import REPOSITORY, random_ids, tiny_config, with_cache
from .test_sliding import SCHEMES, pair, reader

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, NEW = 200, 6
IDS = random_ids(2, PROMPT + NEW)
CHILD = """
import sys, torch
from pathlib import Path
from tests.common.runtime.cache.test_cache_file import NEW, QuantizedCache, go_on, reader
torch.set_num_threads(1)
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    name = torch.load(file.with_suffix(".name"))
    found = go_on(QuantizedCache.load(file, config=reader(*name).config), *name)
    assert torch.equal(found, torch.load(file.with_suffix(".pt"))), file
    print(file.name)
"""
IN_BYTES = {**load_scheme("octavo-2").key.to_dict(), "group_size": 16, "scale_dtype": "fp8_e4m3"}
SAVED = {
    **SCHEMES,
    "smoothed": Scheme.from_dict({**load_scheme("octavo-4").to_dict(), "smooth_key": True}),
    "zeros in a byte": Scheme.from_dict({**load_scheme("octavo-2").to_dict(), "key": IN_BYTES}),
}


def filled(scheme: Scheme, name: str = "qwen2", **arguments: Any) -> QuantizedCache:
    """A cache that holds a prompt, of a model of which two layers slide."""
    cache = pair(scheme, name, **arguments)[0]
    with torch.inference_mode():
        reader(name, scheme.fold_bias)(IDS[:, :PROMPT], **with_cache(cache))
    return cache


def go_on(cache: QuantizedCache, name: str, is_folded: bool) -> torch.Tensor:
    """Logits of single tokens behind the prompt."""
    steps = IDS[:, PROMPT:].split(1, dim=1)
    with torch.inference_mode():
        return torch.cat([reader(name, is_folded)(token, **with_cache(cache)).logits for token in steps], dim=1)


def parts(cache: QuantizedCache) -> list[torch.Tensor]:
    return [part for layer in cache.layers for part in layer.saved()[1].values()]


def assert_same(one: QuantizedCache, other: QuantizedCache) -> None:
    """Two caches hold the same, bit for bit, in as much memory."""
    assert one.scheme == other.scheme and one.nbytes() == other.nbytes()
    assert [layer.get_seq_length() for layer in one.layers] == [layer.get_seq_length() for layer in other.layers]
    for ours, theirs in zip(parts(one), parts(other), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("scheme", SAVED)
def test_a_cache_comes_back_bit_for_bit(scheme: str, tmp_path: Path) -> None:
    cache, file = filled(SAVED[scheme]), tmp_path / "cache.safetensors"
    cache.save(file)
    loaded = QuantizedCache.load(file, config=reader("qwen2").config)
    assert_same(cache, loaded)
    name = ("qwen2", SAVED[scheme].fold_bias)
    assert torch.equal(go_on(loaded, *name), go_on(cache, *name))
    loaded.crop(-NEW), cache.crop(-NEW)
    assert_same(cache, loaded)
    assert list(tmp_path.iterdir()) == [file], "nothing beside it"


@pytest.mark.parametrize(
    "names", [("int8-token", "octavo-4", "ascend-fa"), pytest.param(tuple(SAVED), marks=pytest.mark.slow)], ids=len
)
def test_another_process_goes_on_from_the_files(names: tuple[str, ...], tmp_path: Path) -> None:
    for number, scheme in enumerate(map(SAVED.get, names)):  # one process serves all
        file, name = tmp_path / f"{number}.safetensors", ("qwen2", scheme.fold_bias)
        cache = filled(scheme)
        cache.save(file)
        torch.save(name, file.with_suffix(".name"))
        torch.save(go_on(cache, *name), file.with_suffix(".pt"))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(names)


def test_a_loaded_cache_goes_on_growing_and_forgetting(tmp_path: Path) -> None:
    cache, file = filled(SCHEMES["int8-token"]), tmp_path / "cache"
    for _ in range(3):
        cache.save(file)
        loaded = QuantizedCache.load(file)
        for each in (cache, loaded):
            with torch.inference_mode():
                reader("qwen2")(IDS, **with_cache(each))
        assert_same(cache, loaded)
        cache = loaded
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("tokens", [0, 20])
def test_a_cache_that_counts_on_the_device_comes_back(tokens: int, tmp_path: Path) -> None:
    cache = QuantizedCache(reader("qwen2").config, "int8-token", max_length=PROMPT + NEW, compileable=True)
    file, model = tmp_path / "cache", reader("qwen2")
    if tokens:
        model(IDS[:, :tokens], **with_cache(cache))
    cache.save(file)
    loaded = QuantizedCache.load(file)
    assert loaded.is_compileable and int(loaded.get_seq_length()) == tokens
    found, wanted = (model(IDS[:, tokens : tokens + 9], **with_cache(each)).logits for each in (loaded, cache))
    assert torch.equal(found, wanted) and int(loaded.get_seq_length()) == tokens + 9


def test_an_empty_cache_keeps_its_scheme_and_scales(tmp_path: Path) -> None:
    cache, file = pair(SCHEMES["ascend-fa"], "qwen2", crop_room=7)[0], tmp_path / "cache"
    cache.save(file)
    loaded = QuantizedCache.load(file)
    assert_same(cache, loaded)
    assert loaded.layers[0].crop_room == 7
    assert torch.equal(go_on(loaded, "qwen2", False), go_on(cache, "qwen2", False))


# What is refused.


def rewritten(file: Path, **changes: Any) -> None:
    """The same tensors with other metadata; `facts` are merged into those of the cache."""
    with safe_open(file, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata={**metadata, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    file = tmp_path / "cache.safetensors"
    filled(SCHEMES["octavo-4"]).save(file)
    return file


def refusal(file: Path, **arguments: Any) -> str:
    with pytest.raises(OctavoError) as refused:
        QuantizedCache.load(file, **arguments)
    assert "\n" not in str(refused.value) and str(file) in str(refused.value)
    return str(refused.value)


def test_a_file_that_is_damaged_or_none_is_refused_in_one_line(saved: Path) -> None:
    whole = saved.read_bytes()
    for place in (0, 9, 200, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refusal(saved)
    saved.write_bytes(whole[:-100])
    refusal(saved)
    saved.write_bytes(b"")
    refusal(saved)
    saved.unlink()
    assert "cannot be read" in refusal(saved)


def test_files_of_others_and_of_other_versions_are_refused(saved: Path) -> None:
    rewritten(saved, format="octavo-cache-9")
    assert "octavo-cache-9, and this is code for octavo-cache-1" in refusal(saved)
    rewritten(saved, format="octavo-statistics-2")
    assert "is no cache" in refusal(saved)


def test_a_scheme_of_the_future_is_refused_by_its_field(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = QuantizedCache.load(saved)
    monkeypatch.setattr(Scheme, "to_dict", lambda self: {"name": "mine", "spiral": 3})
    cache.save(saved)
    assert "unknown field 'spiral'" in refusal(saved)


def test_a_cache_of_another_model_is_refused(saved: Path) -> None:
    for changes, message in (
        ({"num_hidden_layers": 5}, "layers 3, and this model has 5"),
        ({"num_key_value_heads": 4}, "KV heads 2, and this model has 4"),
        ({"head_dim": 16}, "head_dim 32, and this model has 16"),
        ({"head_dim": 32}, "whose layers slide otherwise"),
    ):
        assert message in refusal(saved, config=tiny_config(**{"head_dim": 32, **changes}))
    cache = QuantizedCache.load(saved)
    with pytest.raises(OctavoError, match="heads"):
        cache.update(torch.zeros((2, 2, 1, 16)), torch.zeros((2, 2, 1, 16)), 0)
    with pytest.raises(OctavoError, match="is of 3 layers"):
        cache.update(torch.zeros((2, 2, 1, 32)), torch.zeros((2, 2, 1, 32)), 3)


def test_a_converted_model_refuses_a_cache_of_another_depth(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=2)
    config.octavo = {"scheme": "int8-token"}
    model, file = LlamaForCausalLM(config).eval(), tmp_path / "cache"
    QuantizedCache(tiny_config(), "int8-token").save(file)
    with pytest.raises(OctavoError, match="is of 3 layers, and this model has 2"):
        model(IDS, **with_cache(QuantizedCache.load(file)))


def test_what_stood_there_stays_when_a_cache_cannot_be_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, before = QuantizedCache.load(saved), saved.read_bytes()

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("octavo.common.runtime.cache.cache_file.save_file", full)
    with pytest.raises(OctavoError, match=r"cannot be written .*No space left"):
        cache.save(saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]
    monkeypatch.undo()
    with pytest.raises(OctavoError, match="cannot be written"):
        cache.save(saved.parent / "nowhere" / "cache")
    for no_file in (saved / "cache", saved.parent, ""):  # below a file, a directory, and no name
        with pytest.raises(OctavoError, match="cannot be written"):
            cache.save(no_file)


def test_the_header_says_what_the_file_is(saved: Path) -> None:
    with safe_open(saved, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == CACHE_FORMAT
    assert Scheme.from_dict(json.loads(metadata["cache"])["scheme"]) == load_scheme("octavo-4")
