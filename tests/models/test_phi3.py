"""What Phi-3 has that no other architecture has: LongRoPE, and checkpoints as its makers publish them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from octavo import QuantizedCache, prepare
from octavo.common.convert.api import main
from octavo.common.errors import OctavoError
from octavo.common.runtime.schemes.kv_scheme import Scheme
from octavo.models.phi3 import ARCHITECTURE

from ..support import (
    convert_flags,
    edit_json,
    files_below,
    quantized_tensors,
    random_ids,
    randomized,
    save_source,
    tiny_config,
    with_cache,
)
from ..tolerances import TOLERANCES
from .loading import load_without_octavo, save_expected

pytestmark = pytest.mark.usefixtures("one_thread")

ORIGINAL = 48
"""Tokens from which on other angles are used."""
LONG = {"type": "longrope", "short_factor": [1.1] * 6, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0]}
PUBLISHED = {
    "rope_parameters": None,
    "rope_scaling": LONG,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": ORIGINAL,
    "transformers_version": "4.40.2",
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
}
"""The spelling of Phi-4 mini's config.json."""
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def tiny_phi3() -> Phi3ForCausalLM:
    fields = {k: v for k, v in tiny_config().to_diff_dict().items() if k not in ("model_type", "rope_parameters")}
    spelling = {k: v for k, v in PUBLISHED.items() if k not in ("rope_parameters", "transformers_version", "auto_map")}
    torch.manual_seed(0)
    return randomized(Phi3ForCausalLM(Phi3Config(**fields, **{**spelling, "rope_scaling": dict(LONG)})))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with code of its own, which must not run."""
    source = save_source(tmp_path_factory.mktemp("published") / "source", tiny_phi3())
    edit_json(source / "config.json", **PUBLISHED)
    for name in ("configuration_phi3.py", "modeling_phi3.py"):
        (source / name).write_text("raise SystemExit('this ran')")
    return source


def test_a_published_checkpoint(published: Path, tmp_path: Path) -> None:
    target, expected = tmp_path / "out", tmp_path / "expected.safetensors"
    assert main(ARCHITECTURE, convert_flags(published, target, "--use_kvcache_quant", "True")) == 0
    assert [name for name in files_below(target) if name.endswith(".py")] == [
        "modeling_phi3_fa3.py",
        "octavo_runtime.py",
    ]
    config = json.loads((target / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_phi3_fa3.Phi3ForCausalLM"}
    model, ids = ARCHITECTURE.model_class.from_pretrained(target).eval(), random_ids(1, ORIGINAL)
    with torch.inference_mode():
        wanted = tiny_phi3()(ids).logits
        error = (model(ids).logits - wanted).square().mean().sqrt() / wanted.std()
    assert error < TOLERANCES["rmse of a tiny model, C8"]
    save_expected(model, expected)
    assert load_without_octavo([("out", str(target), str(expected))], tmp_path)["out"][:3] == [True] * 3


def test_names_in_the_files_are_those_of_the_format(published: Path, tmp_path: Path) -> None:
    target, prefix = tmp_path / "out", "model.layers.0.self_attn"
    assert main(ARCHITECTURE, convert_flags(published, target, "--use_kvcache_quant", "True")) == 0
    description = json.loads((target / "quant_model_description.json").read_text())
    assert description[f"{prefix}.qkv_proj.weight"] == description[f"{prefix}.qkv_proj.quant_bias"] == "W8A8"
    assert description["model.layers.0.mlp.gate_up_proj.weight"] == "W8A8"
    assert description["model.layers.0.mlp.down_proj.weight"] == "FLOAT"
    own = {n.removeprefix(prefix): t.shape for n, t in quantized_tensors(target).items() if f"{prefix}.k_" in n}
    assert own == {".k_proj.kv_cache_scale": (2 * 16,), ".k_proj.kv_cache_offset": (2 * 16,)}


WAYS: dict[str, dict[str, Any]] = {
    "stock": {},
    "converted": {},
    "converted, of a fixed length": {"cache_implementation": "static"},
    "converted, with a cache": {},
}


def with_scheme(scheme: str) -> torch.nn.Module:
    """The zoo's own Phi-3 of the weights of `tiny_phi3`."""
    stock = tiny_phi3()
    fields = {k: v for k, v in stock.config.to_dict().items() if k != "_attn_implementation"}
    model = ARCHITECTURE.model_class(Phi3Config(**fields, octavo={"scheme": scheme}))
    model.load_state_dict(stock.state_dict())
    return model.double().eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["int8-token", "octavo-4"])
def test_generation_goes_on_beyond_the_original_length(scheme: str, way: str) -> None:
    model = prepare(tiny_phi3().double()) if way == "stock" else with_scheme(scheme)
    arguments, ids, given = WAYS[way], random_ids(2, ORIGINAL - 5), QuantizedCache(model.config, scheme)
    if way in ("stock", "converted, with a cache"):
        arguments = with_cache(given)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments, **GREEDY)
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.inference_mode():
            logits = model(ids, **with_cache(QuantizedCache(model.config, scheme))).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(found, ids)
    assert given.get_seq_length() in (0, found.shape[1] - 1)


def test_keys_as_before_rope_are_refused_beyond_it() -> None:
    scheme = {"name": "mine", "key": {"dtype": "int8", "granularity": "token", "dynamic": True, "before_rope": True}}
    model = prepare(tiny_phi3())
    for tokens in (ORIGINAL, ORIGINAL + 1):
        given = with_cache(QuantizedCache(model.config, Scheme.from_dict(scheme)))
        with torch.inference_mode():
            if tokens > ORIGINAL:
                with pytest.raises(
                    OctavoError, match=f"as before RoPE, whose angles are others beyond {ORIGINAL} tokens"
                ):
                    model(random_ids(1, tokens), **given)
            else:
                model(random_ids(1, tokens), **given)
