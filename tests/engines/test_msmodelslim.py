"""Ascend's dialect beside what msmodelslim 26.1 writes: names, labels, dtypes and shapes, and tensors of our codes.

Its quantizer runs on the CPU, on the same tiny Llama, and its newer saver (`AscendV1Saver`) is run function by function
on the codes and scales of ours. `make test-engines` installs it; it was compiled for Python 3.8 to 3.12.
"""

import json
import re
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.common.convert.api import main
from octavo.models.llama3 import ARCHITECTURE

from ..support import convert_flags, save_source, tiny_llama
from .environments import packages_of, run_with

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SCRIPT = Path(__file__).with_name("run_msmodelslim.py")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
HEAD = ("--disable_names", "lm_head")
W8A8, W4A16 = {"w_bit": 8, "a_bit": 8}, {"w_bit": 4, "a_bit": 16}
IN_GROUPS = {"is_lowbit": True, "open_outlier": False, "group_size": 64}
CASES = {
    "W8A8": (W8A8, ()),
    "W8A8_DYNAMIC": ({**W8A8, "is_dynamic": True}, ("--is_dynamic", "True")),
    "W8A8_MIX": ({**W8A8, "pdmix": True}, ("--pdmix", "True", "--target", "mindie")),
    "W8A16": ({"w_bit": 8, "a_bit": 16}, ("--a_bit", "16")),
    "W8A16-in-groups": ({"w_bit": 8, "a_bit": 16, **IN_GROUPS}, ("--a_bit", "16", "--group_size", "64")),
    "W4A16": (W4A16, ("--w_bit", "4", "--a_bit", "16", "--group_size", "0")),
    "W4A16-in-groups": ({**W4A16, **IN_GROUPS}, ("--w_bit", "4", "--a_bit", "16", "--group_size", "64")),
    "C8": ({**W8A8, "kv_quant": True}, ("--use_kvcache_quant", "True")),
    "FAQuant": ({**W8A8, "fa_quant": True}, ("--use_fa_quant", "True")),
}
"""Its `QuantConfig` and our flags, which stand for the same."""
SAVED = {"W8A8": "w8a8_static", "W8A8_DYNAMIC": "w8a8_dynamic_per_channel", "W8A8_MIX": "w8a8_pd_mix"}
SAVED |= {"W8A16": "w8a16_static_per_channel", "W8A16-in-groups": "w8a16_static_per_group"}
"""Functions of its newer saver; it has none of W4A16, takes any tensor in C8, and its FAQuant is MLA's."""


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By case, `ours/CASE` and, of one checkpoint of a dtype, msmodelslim's `theirs/CASE`, `saved/CASE`."""
    packages = packages_of("msmodelslim")
    if not re.fullmatch(r"[\w/.-]+", str(packages.resolve()), re.ASCII):
        pytest.skip(f"msmodelslim takes no path with other characters than [_A-Za-z0-9/.-]: {packages.resolve()}")
    library = f"anti_outlier/anti_utils{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not (packages / "msmodelslim" / "pytorch" / "llm_ptq" / library).exists():
        pytest.skip(f"msmodelslim has no {library}, for this Python and processor")
    folder = tmp_path_factory.mktemp("msmodelslim")
    source = save_source(folder / "source", tiny_llama(**SIZES).to(getattr(torch, request.param)))
    for name, (_, flags) in CASES.items():
        assert main(ARCHITECTURE, convert_flags(source, folder / "ours" / name, *HEAD, *flags)) == 0
    cases, saved = json.dumps({name: case for name, (case, _) in CASES.items()}), json.dumps(SAVED)
    done = run_with(packages, SCRIPT, source, request.param, cases, saved, folder, folder=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def described(directory: Path) -> dict[str, str]:
    return json.loads((directory / "quant_model_description.json").read_text())


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    (file,) = directory.glob("quant_model_weight_*.safetensors")
    return load_file(file)


def kind_of(name: str, tensor: torch.Tensor) -> str:
    """Its dtype; of floats that any reader casts, only that they are floats: theirs are the model's, ours float32."""
    is_cast = tensor.is_floating_point() and not name.endswith(".deq_scale")
    return "float" if is_cast else str(tensor.dtype)


@pytest.mark.parametrize("name", CASES)
def test_names_labels_dtypes_and_shapes_are_those_of_its_quantizer(name: str, written: Path) -> None:
    ours, theirs = (written / whose / name for whose in ("ours", "theirs"))
    assert described(ours) == described(theirs)
    assert [file.name for file in ours.glob("quant_model_weight*")] == [file.name for file in theirs.glob("*weight*")]
    stored, expected = tensors_of(ours), tensors_of(theirs)
    assert stored.keys() == expected.keys()
    for tensor in stored:
        if name.startswith("W4A16") and tensor.endswith("_proj.weight"):
            continue  # see below
        found = kind_of(tensor, stored[tensor]), stored[tensor].shape
        assert found == (kind_of(tensor, expected[tensor]), expected[tensor].shape), tensor


@pytest.mark.parametrize("name", ["W4A16", "W4A16-in-groups"])
def test_codes_of_int4_lie_otherwise(name: str, written: Path) -> None:
    """Ours in blocks of 32 along K, `[N, K / 2]` in uint8; theirs in pairs, of groups along N: see `targets.py`."""
    stored, expected = (tensors_of(written / whose / name) for whose in ("ours", "theirs"))
    weight = "model.layers.0.mlp.gate_proj.weight"
    rows, columns = SIZES["intermediate_size"], SIZES["hidden_size"]
    assert (stored[weight].dtype, stored[weight].shape) == (torch.uint8, (rows, columns // 2))
    shape = (rows // 2, columns) if name.endswith("groups") else (rows, columns // 2)
    assert (expected[weight].dtype, expected[weight].shape) == (torch.int8, shape)


@pytest.mark.parametrize("name", SAVED)
def test_its_saver_makes_our_tensors_of_our_codes(name: str, written: Path) -> None:
    saved = written / "saved"
    found, labels = load_file(saved / name), json.loads((saved / f"{name}.json").read_text())
    stored, description = tensors_of(written / "ours" / name), described(written / "ours" / name)
    linears = [tensor for tensor in stored if tensor.endswith("_proj.weight")]
    assert len(linears) == 3 * 7 and all(linear in found for linear in linears)
    for tensor, expected in found.items():
        assert description[tensor] == labels[tensor]
        assert stored[tensor].dtype == expected.dtype and torch.equal(stored[tensor], expected), tensor
