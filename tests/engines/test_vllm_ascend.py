"""Directories of Octavo as vllm-ascend reads them, by its own config, schemes and adapters; see the reader.

The reader runs the `quantization` package of the wheel; not run are vLLM's engine, its attention, and CANN's operators,
which stand-ins replace that compute what torch_npu documents. `make test-engines` unpacks the wheels.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from octavo.common.convert.api import main
from octavo.models.llama3 import ARCHITECTURE
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ..metrics import rmse_in_std
from ..support import convert_flags, save_source, tiny_llama
from .environments import packages_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

READER = Path(__file__).with_name("vllm_ascend_reader.py")
LAYERS = 3
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
C8 = ("--use_kvcache_quant", "True")
Convert = Callable[..., Path]


@pytest.fixture(scope="module", params=["0.23.0", "0.25.1rc1"])
def version(request: pytest.FixtureRequest) -> str:
    """A version of vllm-ascend whose wheel is unpacked here."""
    packages_of(f"vllm_ascend_{request.param}")
    return request.param


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """`convert(dtype, *flags)`: a tiny Llama of that dtype, converted; beside it, `.inputs` of each linear."""
    made: dict[tuple[str, ...], Path] = {}

    def of(dtype: str, *flags: str) -> Path:
        if (dtype, *flags) not in made:
            folder = tmp_path_factory.mktemp("vllm-ascend")
            source = save_source(folder / "source", tiny_llama().to(getattr(torch, dtype)))
            assert main(ARCHITECTURE, convert_flags(source, folder / "out", *flags)) == 0
            torch.manual_seed(1)
            widths = {"self_attn.qkv_proj": 64, "self_attn.o_proj": 64, "mlp.gate_up_proj": 64, "mlp.down_proj": 128}
            inputs = {
                f"model.layers.{n}.{part}": torch.randn(9, k) for n in range(LAYERS) for part, k in widths.items()
            }
            save_file(inputs, folder / "out.inputs")
            made[(dtype, *flags)] = folder / "out"
        return made[(dtype, *flags)]

    return of


def run_reader(version: str, directory: Path, dtype: str, out: Path, *part: str) -> "subprocess.CompletedProcess[str]":
    package = packages_of(f"vllm_ascend_{version}")
    command = [str(READER), str(package), str(directory), str(LAYERS), dtype, str(out), *part]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)


def read(version: str, directory: Path, dtype: str, out: Path, *part: str) -> dict[str, torch.Tensor]:
    """What the reader loads and computes."""
    done = run_reader(version, directory, dtype, out, *part)
    assert done.returncode == 0, done.stderr
    return load_file(out)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    (file,) = directory.glob("quant_model_weight_*.safetensors")
    return load_file(file)


def assert_loaded(found: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    """Every tensor of ours that a linear or a cache needs is held, bit for bit where it is code or decides codes."""
    checked = set()
    for name, tensor in found.items():
        parent, _, part = name.rpartition(".")
        owner, _, linear = parent.rpartition(".")
        if name.endswith(" output"):
            continue
        names = [f"{owner}.{shard}.{part}" for shard in FUSED.get(linear, (linear,))]
        if part == "weight_offset" and tensors[names[0].replace(part, "weight")].dtype == torch.float8_e4m3fn:
            continue  # it has room for one, which nothing reads
        if linear == "attn" and name not in tensors:
            names = [f"{owner}.{part[0]}_proj.kv_{part[2:]}"]
        wanted = [tensors[each] for each in names]
        is_one = len(wanted) > 1 and tensor.shape == wanted[0].shape == (1,)
        assert not is_one or all(torch.equal(wanted[0], other) for other in wanted)
        expected = wanted[0] if is_one else torch.cat(wanted)
        expected_dtype = expected.to(tensor.dtype)
        assert torch.equal(tensor.view(torch.uint8), expected_dtype.view(torch.uint8)), name
        if not expected.is_floating_point() or part in ("input_scale", "input_offset", "deq_scale"):
            assert torch.equal(tensor.double(), expected.double()), f"{name} is rounded"
        checked.update(names)
    needed = {name for name in tensors if "_proj." in name or ".attn." in name}
    assert needed <= checked, needed - checked


def assert_computed(found: dict[str, torch.Tensor], directory: Path, dtype: str, tolerance: float) -> None:
    """Each linear gives what Octavo's own class gives for the same inputs."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    inputs = load_file(f"{directory}.inputs")
    outputs = [name for name in found if name.endswith(" output")]
    assert outputs
    for name in outputs:
        owner, _, linear = name.removesuffix(" output").rpartition(".")
        parts: list[nn.Module] = [model.get_submodule(f"{owner}.{shard}") for shard in FUSED.get(linear, (linear,))]
        x = inputs[f"{owner}.{linear}"].to(getattr(torch, dtype))
        with torch.inference_mode():
            expected = torch.cat([part(x) for part in parts], dim=-1)
        assert rmse_in_std(found[name].float(), expected.float()) < tolerance, name


CASES = [
    ("bfloat16", "bfloat16", ()),
    ("float32", "bfloat16", ()),
    ("float16", "float16", ()),
    ("bfloat16", "bfloat16", ("--is_dynamic", "True")),
    ("bfloat16", "bfloat16", ("--a_bit", "16")),
    ("bfloat16", "bfloat16", ("--quantization", "fp8")),
]


@pytest.mark.parametrize(("dtype", "engine", "flags"), CASES)
def test_every_tensor_is_loaded_and_every_linear_computes(
    version: str, dtype: str, engine: str, flags: tuple[str, ...], convert: Convert, tmp_path: Path
) -> None:
    target = "vllm-ascend-0.23" if version.startswith("0.23") else "vllm-ascend"
    directory = convert(dtype, *C8, *flags, "--target", target)
    found = read(version, directory, engine, tmp_path / "found")
    assert_loaded(found, stored(directory))
    assert_computed(found, directory, engine, 0.01)
    scales = [name for name in found if ".attn." in name]
    assert len(scales) == 4 * LAYERS


def test_a_mix_is_static_where_it_decodes_apart(version: str, convert: Convert, tmp_path: Path) -> None:
    """And by token everywhere else, over the same codes."""
    flags = ("--target", "vllm-ascend", "--disable_names", "lm_head")
    mix, by_token = convert("bfloat16", *flags, "--pdmix", "True"), convert("bfloat16", *flags, "--is_dynamic", "True")
    static, dynamic = (read(version, mix, "bfloat16", tmp_path / f"found {part}", *part) for part in (("decodes",), ()))
    for found, directory in ((static, mix), (dynamic, by_token)):
        assert_loaded(found, stored(mix))
        assert_computed(found, directory, "bfloat16", 0.01)


def test_int4_is_loaded_and_computes_as_ours(version: str, convert: Convert, tmp_path: Path) -> None:
    """Two codes to a byte, whose operator takes inputs in float, as our W4A16 does where it is asked to."""
    flags = ("--w_bit", "4", "--a_bit", "16", "--group_size", "32", "--cpu_activations", "float")
    ours, written = convert("bfloat16", *flags), convert("bfloat16", *flags, "--format", "vllm-ascend-w4a8")
    found = read(version, written, "bfloat16", tmp_path / "found")
    (file,) = written.glob("*.safetensors")
    assert_loaded(found, load_file(file))
    assert_computed(found, ours, "bfloat16", 0.01)


def test_c8_beside_int4(version: str, convert: Convert, tmp_path: Path) -> None:
    if version.startswith("0.23"):
        pytest.skip("0.23 takes other names of these scales, which the format does not write")
    flags = ("--w_bit", "4", "--a_bit", "16", "--format", "vllm-ascend-w4a8")
    found = read(version, convert("bfloat16", *C8, *flags), "bfloat16", tmp_path / "found")
    assert len([name for name in found if ".attn." in name]) == 4 * LAYERS


def test_names_of_mindie_are_refused_by_0_23(version: str, convert: Convert, tmp_path: Path) -> None:
    """Only Qwen3, GLM4-MoE and MiniMax-M2 are patched there; from 0.25 on, vLLM's loader maps the names."""
    if not version.startswith("0.23"):
        pytest.skip("vLLM's own loader maps the names from 0.25 on, which the reader does not run")
    done = run_reader(version, convert("bfloat16", *C8), "bfloat16", tmp_path / "found")
    assert done.returncode and "qkv_proj.kv_cache_" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--use_fa_quant", "True"), "doesn't support quant_type=FAQuant for layer_type=attention"),
        (("--disable_names", "*.q_proj"), "Detected some but not all shards of model.layers.0.self_attn.qkv_proj"),
        (("--w_bit", "4", "--a_bit", "16"), "doesn't support quant_type=W4A16"),
    ],
)
def test_what_a_target_refuses_is_refused_there(
    version: str, flags: tuple[str, ...], reason: str, convert: Convert, tmp_path: Path
) -> None:
    done = run_reader(version, convert("bfloat16", *flags), "bfloat16", tmp_path / "found")
    assert done.returncode and reason in done.stderr, done.stderr


@pytest.mark.parametrize(
    "flags", [("--is_dynamic", "True", "--anti_method", "m2"), ("--a_bit", "16", "--w_sym", "False")]
)
def test_what_a_target_refuses_is_computed_wrong_there(
    version: str, flags: tuple[str, ...], convert: Convert, tmp_path: Path
) -> None:
    directory = convert("bfloat16", *flags)
    found = read(version, directory, "bfloat16", tmp_path / "found")
    with pytest.raises(AssertionError, match=r"^model\.layers\.\d+\.\S+ output"):
        assert_computed(found, directory, "bfloat16", 0.05)
    assert json.loads((directory / "quant_model_description.json").read_text())["model_quant_type"] != "FLOAT"
