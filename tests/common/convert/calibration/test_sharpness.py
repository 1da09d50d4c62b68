"""Which layers are sharp: by the definition, term by term, and that a layer with sharp attention is found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

from octavo import ConvertRequest, QuantizedCache, convert
from octavo.common.convert.calibration import sharpness
from octavo.common.convert.calibration.bases import NEWEST, SINKS
from octavo.common.convert.calibration.sharpness import find_sharpness, repeating_itself
from octavo.common.convert.calibration.whole import calibrate_whole
from octavo.common.convert.dialects.directory import OctavoDirectory
from octavo.common.errors import OctavoError
from octavo.common.runtime.rotary import rope_constants, rotated_by_slot
from octavo.common.runtime.schemes.kv_scheme import Scheme, load_scheme
from octavo.common.runtime.schemes.tensor_codec import Codec
from octavo.common.runtime.static_scales import LayerScales, Statistics, load_statistics, scales_of, settled

from ....support import TEXTS, random_ids, randomized, save_source, tiny_config, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = [{"input_ids": random_ids(1, 300)}]
NARROW = Codec("int4", "token", dynamic=True)
SHARP = Scheme("sharp", NARROW, NARROW, sharp_share=0.5)


def sharpnesses(model: torch.nn.Module) -> list[float]:
    found = find_sharpness(model, SAMPLES, Statistics({}, {})).tensors
    return [float(found[f"layers.{index}.k.sharpness"]) for index in range(model.config.num_hidden_layers)]


def by_definition(seen: list[Any], frequencies: torch.Tensor) -> float:
    """What the module says, term by term in float64, of q, K, V, scaling and gradient of a layer."""
    (query, key, value), scaling, _, gradient = seen
    query, key, value = (part[0].double() for part in (query, key, value))
    gradient, width = gradient[0].transpose(0, 1).double(), key.shape[-1]
    before = rotated_by_slot(key[None].float(), frequencies, 0, backwards=True)
    before -= before[:, :, SINKS:].mean(dim=2, keepdim=True)
    rest = rotated_by_slot(before, frequencies, 0)[0, :, SINKS:].double()
    total = 0.0
    for group in range(len(key)):
        metric = torch.zeros(width, width, dtype=torch.float64)
        reads = len(query) // len(key)
        for head in range(group * reads, (group + 1) * reads):
            for t in range(query.shape[1]):
                share = torch.softmax(key[group, : t + 1] @ query[head, t] * scaling, dim=0)
                output = share @ value[group, : t + 1]
                for j in range(SINKS, t + 1 - NEWEST):
                    noticed = scaling * share[j] * (gradient[head, t] @ (value[group, j] - output))
                    metric += noticed**2 * torch.outer(query[head, t], query[head, t]) / query.shape[1]
        spread = sum(torch.outer(x, x) for x in rest[group]) / rest.shape[1]
        shared = torch.linalg.eigvals(metric @ spread).real.clamp_min(0)
        total += float(shared.sqrt().sum() ** 2 / width)
    return total


def test_sharpness_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLES[0], "input_ids", random_ids(1, 90))  # term by term takes its time
    model, seen = tiny_llama(), []
    call: Callable[..., None] = sharpness._Follower.__call__

    def see(self: Any, *parts: Any) -> None:
        seen.append(parts)
        call(self, *parts)

    monkeypatch.setattr(sharpness._Follower, "__call__", see)
    found = sharpnesses(model)
    assert len(seen) == len(found) == 3, "each layer is seen once, though it is run twice"
    frequencies, _ = rope_constants(model.config, 16)
    for parts, own in zip(reversed(seen), found, strict=True):
        assert own == pytest.approx(by_definition(list(parts), frequencies), rel=1e-3) and own > 0


def test_predictions_count_where_the_text_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of the last layer goes into the prediction at its own token alone."""
    gradients: list[torch.Tensor] = []
    monkeypatch.setattr(sharpness._Follower, "__call__", lambda _, *parts: gradients.append(parts[3]))
    monkeypatch.setattr(sharpness._Follower, "sharpness", lambda _: torch.ones(1))
    sharpnesses(tiny_llama())
    first, second = gradients[0][0].flatten(1).abs().amax(dim=1).split(150)
    assert not first.any() and second.all()


def test_queries_that_are_larger_make_a_layer_sharper() -> None:
    before = sharpnesses(tiny_llama())
    for layer in range(3):
        model = tiny_llama()
        with torch.no_grad():
            model.model.layers[layer].self_attn.q_proj.weight *= 4
        assert sharpnesses(model)[layer] > 2 * before[layer]


def test_predictions_are_those_of_the_model() -> None:
    """Granite divides the outputs of its last linear."""

    def granite(divisor: float) -> GraniteForCausalLM:
        torch.manual_seed(0)
        sizes = tiny_config().to_dict() | {"tie_word_embeddings": False, "logits_scaling": divisor}
        return randomized(GraniteForCausalLM(GraniteConfig(**{**sizes, "model_type": "granite"})))

    divided, plain = granite(8.0), granite(1.0)
    with torch.no_grad():
        plain.lm_head.weight /= 8
    assert sharpnesses(divided) == pytest.approx(sharpnesses(plain), rel=1e-4)


def test_a_model_that_overflows_is_told() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(OctavoError, match="sharp layers: the model overflows on the calibration text"):
        sharpnesses(model)


def test_the_model_stays_as_it_was() -> None:
    model = tiny_llama().train()
    before = {name: part.clone() for name, part in model.named_parameters()}
    sharpnesses(model)
    assert model.training and model.config._attn_implementation != sharpness.FOLLOWING
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    for name, part in model.named_parameters():
        assert part.requires_grad and part.grad is None and torch.equal(part, before[name])


def test_the_second_half_of_a_text_repeats_the_first() -> None:
    ids = torch.arange(1000)[None]
    text = repeating_itself(ids)[0]
    assert text.shape == (1000,) and torch.equal(text[:500], ids[0, :500])
    assert torch.equal(text[500:].sort().values, ids[0, :500]) and not torch.equal(text[500:], text[:500])


def test_the_sharpest_layers_have_wider_keys() -> None:
    model = tiny_llama(num_hidden_layers=4)
    statistics = calibrate_whole(model, SAMPLES, [SHARP])
    sharp = sorted(range(4), key=lambda index: -float(statistics.tensors[f"layers.{index}.k.sharpness"]))[:2]
    scheme = settled(SHARP, scales_of(SHARP, statistics))
    assert [scheme.of_layer(index).key.dtype for index in range(4)] == [
        "int8" if index in sharp else "int4" for index in range(4)
    ]
    assert all(scheme.of_layer(index).value.dtype == "int4" for index in range(4))
    rest = settled(floats := Scheme("sharp", NARROW, NARROW, sharp_share=0.5, float_layers=tuple(sharp)),
                   scales_of(floats, statistics))  # fmt: skip
    assert {rest.of_layer(index).key and rest.of_layer(index).key.dtype for index in range(4)} == {None, "int8"}


def test_nothing_is_sharp_where_all_layers_are_in_float() -> None:
    floats = Scheme("sharp", NARROW, NARROW, sharp_share=0.5, float_layers=(0, 1, 2))
    found = settled(floats, scales_of(floats, calibrate_whole(tiny_llama(), SAMPLES, [floats])))
    assert found.layers == () and not found.sharp_share


def test_a_scheme_of_which_sharp_layers_are_not_known_tells_of_no_layer() -> None:
    with pytest.raises(ValueError, match="not known yet which layers are sharp"):
        SHARP.of_layer(0)
    counted = SHARP.counted(4, windows=[64, 64, None, None])
    assert [counted.of_layer(index).key.dtype for index in range(4)] == ["int4", "int4", "int8", "int8"]


def test_wider_codes_take_in_the_whole_range() -> None:
    narrow = Codec("int4", "token", dynamic=True, scale_dtype="fp8_e4m3", fixed_scale=0.5, clip=0.9)
    wider = Scheme("s", narrow, narrow, sharp_share=0.5).counted(2).of_layer(0).key
    assert (wider.dtype, wider.scale_dtype, wider.fixed_scale, wider.clip) == ("int8", "float16", 0.0, 1.0)


def test_what_says_nothing_of_sharp_layers_is_refused(tmp_path: Path) -> None:
    plain = calibrate_whole(tiny_llama(), SAMPLES, [load_scheme("oscar-2")])
    with pytest.raises(OctavoError, match="do not tell which layers are sharp; convert again with scheme sharp"):
        scales_of(SHARP, plain)
    with pytest.raises(OctavoError, match="do not tell which layers are sharp; pass statistics=FILE"):
        QuantizedCache(tiny_llama().config, SHARP, scales=[LayerScales()] * 3)
    found = calibrate_whole(tiny_llama(), SAMPLES, [SHARP])
    for tensor, fault in ((-torch.ones(1), "negative"), (torch.ones(2), r"torch\.float32 of shape \[2\]")):
        Statistics(found.tensors | {"layers.0.k.sharpness": tensor}, found.metadata).save(tmp_path / "s")
        with pytest.raises(OctavoError, match=rf"layers\.0\.k\.sharpness is {fault}"):
            load_statistics(tmp_path / "s")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sharp_share": 1.0}, "'sharp_share' is a part of the layers"),
        ({"key": Codec("int8", "token", dynamic=True)}, "sharp_dtype 'int8' is not wider than int8"),
        ({"sharp_dtype": "int3"}, "sharp_dtype 'int3' is not wider than int4: take one of int8"),
        ({"key": Codec("fp8_e4m3", "token", dynamic=True)}, "'sharp_share' is of a K in dynamic codes of integers"),
        ({"key": None}, "'sharp_share' is of a K in dynamic codes of integers"),
        ({"layers": (("0", "int8-token"),)}, "'sharp_share' excludes 'layers' and 'query'"),
    ],
)
def test_a_share_that_goes_with_nothing_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(OctavoError, match=message):
        Scheme(**{"name": "s", "key": NARROW, "value": NARROW, "sharp_share": 0.5} | changed)


def test_a_conversion_writes_which_layers_are_sharp(tmp_path: Path) -> None:
    source, file = save_source(tmp_path / "source", tiny_llama()), tmp_path / "statistics.safetensors"
    fields = {"scheme": SHARP, "linear": None, "calibration": TEXTS, "save_statistics": file}
    convert(ConvertRequest(source, tmp_path / "out", **fields))
    stated = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).octavo["scheme"]
    assert "sharp_share" not in stated and [part["key"]["dtype"] for part in stated["layers"].values()] == ["int8"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    own = QuantizedCache(model.config, SHARP, statistics=file).scheme
    assert own.to_dict() == stated == model.new_cache().scheme.to_dict()
    written = OctavoDirectory(tmp_path / "out").with_cache(SHARP, load_statistics(file)).form
    assert [written.scheme.of_layer(index).key.dtype for index in range(3)].count("int8") == 1
