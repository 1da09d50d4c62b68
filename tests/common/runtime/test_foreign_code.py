"""Directories that bring code of their own: neither run nor asked about, by the scripts and by a load without trust."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ...support import REPOSITORY, assert_one_error_line, edit_json

C8 = ("--use_kvcache_quant", "True")
CODE = """
import sys
print("this code ran", file=sys.stderr)
class CustomConfig: pass
def generate(model, **kwargs): return None
"""
RUN = ["models/llama3/run.py", "--prompt", "Rain", "--max_new_tokens", "2", "--model_path"]
DOCTOR = ["-m", "octavo.common.doctor", "--model_path"]


def run(*command: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A script whose standard input says yes to whatever it is asked."""
    return subprocess.run(
        [sys.executable, *command],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        timeout=300,
    )


def with_code(original: Path, target: Path) -> Path:
    """A copy of a directory to which code was added that everything may be overridden with."""
    shutil.copytree(original, target)
    (target / "custom.py").write_text(CODE)
    (target / "custom_generate").mkdir()
    (target / "custom_generate" / "generate.py").write_text(CODE)
    names = {"AutoConfig": "custom.CustomConfig", "AutoTokenizer": ["custom.Tokenizer", None]}
    edit_json(target / "config.json", auto_map=names)
    edit_json(target / "tokenizer_config.json", auto_map={"AutoTokenizer": ["custom.Tokenizer", None]})
    return target


@pytest.mark.slow
def test_code_beside_a_checkpoint_is_not_run(source: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
    for name, original, command in (("converted", converted(*C8), RUN), ("float", source, DOCTOR)):
        done = run(*command, str(with_code(original, tmp_path / name)))
        assert done.returncode == 0, done.stderr
        assert "this code ran" not in done.stderr and "custom code" not in done.stdout + done.stderr


OWN_CLASS = """
import sys
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM
try:
    LlamaForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"), [(RUN, "the zoo has none for it"), (DOCTOR, "is not run"), (["-c", OWN_CLASS], "custom code")]
)
def test_a_checkpoint_that_only_its_own_code_knows_is_refused(
    command: list[str], said: str, source: Path, tmp_path: Path
) -> None:
    directory = with_code(source, tmp_path / "custom")
    edit_json(directory / "config.json", model_type="custom")
    done = run(*command, str(directory))
    assert done.returncode == 1 and not done.stdout
    assert_one_error_line(done.stderr, "config.json", "custom", said)
    assert "this code ran" not in done.stderr


def test_the_script_of_another_architecture_names_the_right_one(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from octavo.generate import main
    from octavo.models.qwen2 import ARCHITECTURE

    assert main(ARCHITECTURE, ["--model_path", str(source), "--prompt", "Rain"]) == 1
    assert_one_error_line(capsys.readouterr().err, "'llama'", "models/llama3/run.py")


LOAD = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except (OSError, ValueError) as error:
    print(error)
"""


@pytest.mark.slow
def test_a_load_without_trust_says_what_it_needs(converted: Callable[..., Path], tmp_path: Path) -> None:
    """From a directory, and from a snapshot of the hub."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(converted(*C8), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for model in (str(converted(*C8)), "somebody/tiny"):
        done = run("-c", LOAD, model, environment={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr
        assert "needs-trust_remote_code=True" in done.stdout
    assert "needs-trust" in json.loads((converted(*C8) / "config.json").read_text())["transformers_weights"]
