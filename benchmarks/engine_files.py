"""The engines' environments, and their forms of a checkpoint, made again where they are of something else."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine_cases import AVX2, ENGINES, FOR_RANDOM_WEIGHTS, RANDOM, Contender
from engine_process import EngineFailure, EngineProcess

from octavo.common.architecture import REPOSITORY, architecture_names, load_architecture
from octavo.common.convert.output.writer import stage_path, write_json

WORKERS = Path(__file__).parent / "engines"
PREPARE_SECONDS = 7200.0
CODE = ("common/**/*.py", "models/**/*.py", "common/**/*.json")
"""What a conversion of ours depends on; kernels are those of this tree when the directory is loaded."""


@dataclass(frozen=True)
class Model:
    """A checkpoint: its folder's name and place."""

    name: str
    directory: Path

    @property
    def is_random(self) -> bool:
        """Whether nothing but speed can be told of it."""
        return self.name == RANDOM

    @property
    def architecture(self) -> str:
        """The folder of `models/` that serves it."""
        config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        names = {load_architecture(name).model_type: name for name in architecture_names()}
        return names[config["model_type"]]


def slug(name: str) -> str:
    """A file name for the name of a contender."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def environment_name(engine: str, isa: str) -> str:
    """Folder of the environment of an engine; "" for the one that runs this.

    Raises:
        EngineFailure: the engine cannot be limited to these instructions.
    """
    facts = ENGINES[engine]
    if isa == AVX2:
        if facts.avx2 is None:
            raise EngineFailure(f"{engine} has no setting that limits it to AVX2")
        return facts.avx2_environment or facts.environment
    return facts.environment


def start(engine: str, flags: Namespace, log: str) -> EngineProcess:
    """A worker of an engine.

    Raises:
        EngineFailure: its environment is missing, or it cannot be limited to the instructions asked for.
    """
    python, name = Path(sys.executable), environment_name(engine, flags.isa)
    if name:
        folder = flags.environments / name
        python = folder / "bin" / "python"
        if not python.exists():
            raise EngineFailure(f"no environment {folder}; make bench-engines makes it")
    limits = ENGINES[engine].avx2 if flags.isa == AVX2 else {}
    variables = {**os.environ, "OMP_NUM_THREADS": str(flags.threads), "HF_HUB_OFFLINE": "1", **limits}
    return EngineProcess(
        [str(python), str(WORKERS / ENGINES[engine].script)], variables, flags.work / "logs" / f"{log}.txt"
    )


def _code_of_conversion() -> str:
    files = sorted(file for part in CODE for file in REPOSITORY.glob(part))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _flags_of(contender: Contender, model: Model, calibration: Path) -> list[str]:
    asked = [*contender.flags, *(FOR_RANDOM_WEIGHTS if model.is_random else ())]
    return [*asked, "--calib_file", str(calibration)]


def _convert(contender: Contender, model: Model, into: Path, calibration: Path, log: Path) -> None:
    script = REPOSITORY / "models" / model.architecture / "convert_quant_weights.py"
    command = [sys.executable, str(script), "--model_path", str(model.directory), "--save_directory", str(into)]
    command += _flags_of(contender, model, calibration)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said:
        if stage_path(into).exists():  # cut off, and perhaps by other code, which cannot go on
            if not subprocess.run([*command, "--resume"], stdout=said, stderr=said, check=False).returncode:
                return
            shutil.rmtree(stage_path(into), ignore_errors=True)
        if subprocess.run(command, stdout=said, stderr=said, check=False).returncode:
            raise EngineFailure(f"the conversion failed; its last words are in {log}")


def _recipe(contender: Contender, model: Model, flags: Namespace) -> dict[str, Any]:
    """What a prepared directory is made of: if it is the same again, it is not made again."""
    recipe = {**asdict(contender), "source": str(model.directory), "loading": None}
    if contender.flags:
        recipe |= {"flags": _flags_of(contender, model, flags.calib_file), "code": _code_of_conversion()}
    else:
        requirements = WORKERS / f"{environment_name(contender.engine, flags.isa)}.txt"
        recipe["requirements"] = requirements.read_text(encoding="utf-8") if requirements.exists() else ""
    return json.loads(json.dumps(recipe))


def prepared(contender: Contender, model: Model, flags: Namespace) -> Path:
    """The directory that a contender loads, made if it is not there or of something else.

    Raises:
        EngineFailure: it cannot be made.
    """
    if not contender.flags and contender.preparing is None:
        return model.directory
    name = slug(contender.name)
    into, stamp = flags.work / model.name / name, flags.work / model.name / f"{name}.json"
    recipe = _recipe(contender, model, flags)
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == recipe:
        return into
    print(f"{model.name}, {contender.name}: making {into}", flush=True)
    stamp.unlink(missing_ok=True)
    shutil.rmtree(into, ignore_errors=True)
    into.parent.mkdir(parents=True, exist_ok=True)
    log = f"{model.name}-{name}-prepare"
    if contender.flags:
        _convert(contender, model, into, flags.calib_file, flags.work / "logs" / f"{log}.txt")
    else:
        with start(contender.engine, flags, log) as worker:
            worker.ask("prepare", PREPARE_SECONDS, source=str(model.directory), into=str(into), **contender.preparing)
    write_json(stamp, recipe)
    return into
