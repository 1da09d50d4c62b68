"""The whole way, on a real model: fetch SmolLM2-135M-Instruct, convert it as `octavo convert` does, and compare.

python examples/demo.py [--model_path MODEL] [--tokens 8000] [--directory .cache/demo]
"""

import argparse
import os
import shlex
import shutil
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from fetch_smollm2 import FetchError, default_directory, fetch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from octavo import ConvertRequest, OctavoError, convert, load_scheme
from octavo.common.command import aligned
from octavo.common.convert.calibration.texts import default_texts
from octavo.common.convert.flags import recipe_fields
from octavo.common.convert.measure.fidelity import Comparison, Fidelity
from octavo.common.convert.output.writer import stage_path
from octavo.common.convert.presets import USUAL
from octavo.common.runtime.cache.sizes import kept_kv_bytes
from octavo.common.runtime.checkpoint.ascend import DESCRIPTION_FILE
from octavo.evaluation.reading import CHUNK, Reader, Times
from octavo.generate import Speaker

PROMPT = "Explain in two sentences why the sky is blue."
ANSWER = 48
"""Tokens of an answer, at most."""
STEPS = 24
"""Tokens that are timed behind the context."""
WIDTH = 96


@dataclass(frozen=True)
class Seen:
    """What was measured of a model.

    Attributes:
        read: seconds that the context took.
        step: seconds of a token behind it.
        logits: `[CHUNK, V]`, of the last tokens of the context.
        answer: to `PROMPT`.
    """

    read: float
    step: float
    logits: torch.Tensor
    answer: str


def _speakers(source: Path, output: Path) -> dict[str, Speaker]:
    """The model as transformers runs it, and as Octavo does."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    return {
        "float32": Speaker(plain, tokenizer, load_scheme("float"), lambda: DynamicCache(config=plain.config)),
        "Octavo": Speaker(ours, tokenizer, ours.scheme, ours.new_cache),
    }


def _answer(speaker: Speaker) -> str:
    """What the model says to the prompt, greedily."""
    inputs = speaker.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = speaker.model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
    return speaker.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _see(speaker: Speaker, ids: torch.Tensor, about: str) -> Seen:
    """Let a model read ids `[S]`, go on from there, and answer the prompt."""
    times = Times()
    reader = Reader(speaker, times)
    with tqdm(total=len(ids) + STEPS + ANSWER, desc=about, unit="token") as bar:
        started = time.perf_counter()
        for part in ids[:-CHUNK].split(CHUNK):
            reader.read(part)
            bar.update(len(part))
        logits = next(reader.logits(ids[-CHUNK:]))
        read = time.perf_counter() - started
        bar.update(CHUNK)
        reader.write(logits[-1], STEPS + 1)
        bar.update(STEPS)
        seen = Seen(read, times.step, logits, _answer(speaker))
        bar.update(ANSWER)
    return seen


def _fidelity(plain: Seen, ours: Seen, ids: torch.Tensor) -> Fidelity:
    """How far apart both are on the last tokens of the context."""
    comparison = Comparison()
    comparison.add(plain.logits[:-1], ours.logits[:-1], ids[1 - CHUNK :])
    return comparison.fidelity()


def _megabytes(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e6


def _table(speakers: dict[str, Speaker], weights: list[float], seen: dict[str, Seen], ids: torch.Tensor) -> list[str]:
    """Both models beside each other, and what was measured how."""
    plain, ours = seen.values()
    found, behind = _fidelity(plain, ours, ids), f"{len(ids):,} tokens"
    caches = [kept_kv_bytes(each.model.config, each.scheme, len(ids), 4) / 1e6 for each in speakers.values()]
    rows = [
        ("", *speakers, ""),
        ("weights, MB", *(f"{size:.1f}" for size in weights), f"{weights[1] / weights[0]:.2f} x"),
        (f"KV cache of {behind}, MB", *(f"{size:.1f}" for size in caches), f"{caches[1] / caches[0]:.2f} x"),
        (f"reading {behind}, s", f"{plain.read:.1f}", f"{ours.read:.1f}", f"{plain.read / ours.read:.1f} x as fast"),
        (
            f"a token behind {behind}, ms",
            *(f"{1e3 * each.step:.1f}" for each in seen.values()),
            f"{plain.step / ours.step:.1f} x as fast",
        ),
        ("perplexity there", f"{found.float_perplexity:.3f}", f"{found.perplexity:.3f}", ""),
        ("likeliest token is float's", "", f"{100 * found.top1:.1f} %", ""),
        ("KL(float || Octavo), nats a token", "", f"{found.kl:.4f}", ""),
    ]
    about = (
        f"float32: transformers with SDPA; in bfloat16 its weights and cache are half as large. Octavo: "
        f"octavo convert, preset {USUAL}. Perplexity and KL: the last {CHUNK} of {behind} of English. Batch 1, "
        f"{torch.get_num_threads()} CPU threads; medians of {STEPS} tokens."
    )
    return [*aligned(rows, texts=1), "", *textwrap.wrap(about, WIDTH)]


def _converted(source: Path, output: Path) -> None:
    """Convert as `octavo convert` does without a flag."""
    if (output / DESCRIPTION_FILE).is_file():  # of the demo before; the conversion refuses any other directory
        shutil.rmtree(output)
    resume = stage_path(output).exists()
    texts = default_texts()
    convert(ConvertRequest(source, output, calibration=texts, resume=resume, **recipe_fields(USUAL)))


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model_path",
        type=Path,
        help="directory of a float model that can chat (default: SmolLM2-135M-Instruct, fetched)",
    )
    add("--tokens", type=int, default=8000, metavar="N", help=f"of the context, over {CHUNK} (default 8000)")
    add("--directory", type=Path, default=Path(".cache") / "demo", help="where the result goes (default .cache/demo)")
    return parser.parse_args()


def _run(flags: argparse.Namespace) -> None:
    """Convert, measure, print."""
    source, output = flags.model_path or fetch(default_directory()), flags.directory
    _converted(source, output)
    speakers = _speakers(source, output)
    ids = AutoTokenizer.from_pretrained(output)("\n".join(default_texts()), return_tensors="pt", verbose=False)
    ids = ids["input_ids"][0, : flags.tokens].long()
    seen = {name: _see(speaker, ids, f"{name} reads and writes") for name, speaker in speakers.items()}
    table = _table(speakers, [_megabytes(source), _megabytes(output)], seen, ids)
    answers = [
        textwrap.fill(" ".join(each.answer.split()), WIDTH, initial_indent=f"{name}: ", subsequent_indent="  ")
        for name, each in seen.items()
    ]
    command = "octavo" if shutil.which("octavo") else os.path.relpath(Path(sys.executable).with_name("octavo"))
    octavo, target = shlex.quote(command), shlex.quote(str(output))
    commands = [
        (f"{octavo} chat {target}", "# talk with it"),
        (f"{octavo} evaluate {target} --reference {shlex.quote(str(source))}", "# what it costs"),
        (f"{octavo} convert MODEL", "# a model of your own"),
    ]
    go_on = [f"  {line}" for line in aligned(commands)]
    print("\n".join(["", *table, "", PROMPT, *answers, "", "to go on:", *go_on]))


def main() -> int:
    """Run; one line if it fails."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    flags = _flags()
    try:
        _run(flags)
    except (OctavoError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
