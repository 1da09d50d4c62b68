"""Convert a model larger than memory allows to hold in float: the peak of resident memory, and the time it takes.

python benchmarks/large.py --work DIR                                    W8A8 + int8-token of Llama 3 8B's shape
python benchmarks/large.py --work DIR --layers 4 -- --is_dynamic True    fewer layers, other flags of the conversion

Random weights, on which neither memory nor time depends, are written in bf16 as a checkpoint of several files. The
conversion is the script that users run, in a process of its own, over random texts. Its time is that of the whole
process, against that of one pass of the float model over the same texts, layer by layer in float32, without the head.
Its peak may be 3 GB and twice the largest decoder layer in bf16, the dtype on disk: the stricter reading, since layers
are computed in float32. Exit code 1 if that, or 3 passes, is exceeded. About 25 GB of disk are needed at 32 layers.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from octavo.common.command import aligned
from octavo.common.convert.calibration.streams import Stream
from octavo.common.convert.calibration.texts import read_calibration_file, tokenize
from octavo.common.convert.output.shards import SAFETENSORS_DTYPES, PlannedFiles
from octavo.common.convert.output.writer import write_json
from octavo.common.convert.source.checkpoint import layerwise_source, load_tokenizer
from octavo.common.runtime.checkpoint.files import TensorHeader

SCRIPT = Path(__file__).parents[1] / "models" / "llama3" / "convert_quant_weights.py"
LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
FLAGS = ("--scheme", "int8-token")
"""Of the conversion, unless others are given."""
GIGABYTE = 10**9
SHARD_BYTES = 4 * GIGABYTE
ROWS_WRITTEN = 2**13
WORDS = 10_000
SHORTEST_TEXT, LONGEST_TEXT = 150, 200
"""Words, each of which is a token; those of BoolQ are about as long."""
MOST_BYTES_BESIDE_LAYERS = 3 * GIGABYTE
MOST_PASSES = 3.0


def planned_tensors(config: LlamaConfig) -> dict[str, TensorHeader]:
    """Shape of every tensor of a model, in bf16."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: TensorHeader("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def write_weights(directory: Path, planned: dict[str, TensorHeader]) -> None:
    """Random weights, some rows at a time; norms of 1."""
    files = PlannedFiles(directory, "model.safetensors", planned, SHARD_BYTES)
    files.create()
    generator = torch.Generator().manual_seed(0)
    for name, header in tqdm(planned.items(), desc="writing weights", unit="tensor"):
        for first in range(0, header.shape[0], ROWS_WRITTEN):
            rows = min(ROWS_WRITTEN, header.shape[0] - first)
            part = torch.ones((rows, *header.shape[1:]), dtype=SAFETENSORS_DTYPES[header.dtype])
            if part.dim() > 1:
                part.normal_(std=0.02, generator=generator)
            files.write(name, part, first)


def write_tokenizer(directory: Path) -> None:
    """Tokens are words that are numbers."""
    tokenizer = Tokenizer(models.WordLevel({str(word): word for word in range(WORDS)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(directory)


def write_texts(file: Path, count: int) -> None:
    """Random words, a text per line."""
    generator = random.Random(0)
    texts = [generator.choices(range(WORDS), k=generator.randint(SHORTEST_TEXT, LONGEST_TEXT)) for _ in range(count)]
    file.write_text("".join(" ".join(map(str, words)) + "\n" for words in texts), encoding="utf-8")


def write_source(directory: Path, layers: int) -> dict[str, TensorHeader]:
    """A checkpoint of Llama 3 8B's shape; returns its tensors."""
    directory.mkdir(parents=True)
    config = LlamaConfig(**LLAMA_3_8B, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    config.save_pretrained(directory)
    write_tokenizer(directory)
    planned = planned_tensors(config)
    write_weights(directory, planned)
    return planned


def float_pass(source: Path, texts: Path, result: Path) -> None:
    """One pass over the texts, layer by layer; its seconds go to a file."""
    tokenizer, lines = load_tokenizer(source, {}, False), read_calibration_file(texts)
    samples = tokenize(tokenizer, lines, LONGEST_TEXT, "input_ids", "attention_mask")
    model = layerwise_source(source, "cpu")
    began = time.perf_counter()
    with torch.no_grad():
        stream = Stream.of(model, samples)
        for index in tqdm(range(len(model)), desc="float pass", unit="layer"):
            with model.layer(index) as layer:
                stream.hidden = stream.through(layer, index)
    write_json(result, {"seconds": time.perf_counter() - began})


def timed_float_pass(source: Path, texts: Path, result: Path) -> float:
    """Seconds of a pass in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    process = get_context("spawn").Process(target=float_pass, args=(source, texts, result))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the float pass ended with {process.exitcode}")
    return json.loads(result.read_text(encoding="utf-8"))["seconds"]


def timed_conversion(argv: list[str]) -> tuple[float, int]:
    """Seconds of a conversion, and the most bytes that were resident in its process.

    Raises:
        RuntimeError: it failed.
    """
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(SCRIPT), *argv])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the conversion ended with {process.returncode}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def size_of(directory: Path) -> int:
    """Bytes of its files."""
    return sum(file.stat().st_size for file in directory.iterdir())


def largest_layer_bytes(planned: dict[str, TensorHeader]) -> int:
    """Bytes of the largest decoder layer on disk."""
    sizes: dict[str, int] = {}
    for name, header in planned.items():
        if ".layers." in name:
            layer = name.split(".layers.")[1].split(".")[0]
            nbytes = math.prod(header.shape) * SAFETENSORS_DTYPES[header.dtype].itemsize
            sizes[layer] = sizes.get(layer, 0) + nbytes
    return max(sizes.values())


def measured(work: Path, flags: argparse.Namespace) -> Iterator[tuple[str, str, bool]]:
    """Rows of the table: what, figure, and whether it is within its limit."""
    source, target, texts = work / "source", work / "quantized", work / "texts.txt"
    planned = write_source(source, flags.layers)
    write_texts(texts, flags.texts)
    float_seconds = timed_float_pass(source, texts, work / "float_pass.json")
    argv = ["--model_path", str(source), "--save_directory", str(target), "--calib_file", str(texts)]
    seconds, peak = timed_conversion([*argv, *(flags.conversion or FLAGS)])
    limit = MOST_BYTES_BESIDE_LAYERS + 2 * largest_layer_bytes(planned)
    passes = seconds / float_seconds
    yield "parameters", f"{sum(math.prod(header.shape) for header in planned.values()):,}", True
    yield "source, GB", f"{size_of(source) / GIGABYTE:.2f}", True
    yield "output, GB", f"{size_of(target) / GIGABYTE:.2f}", True
    yield "peak resident memory, MB", f"{peak / 1e6:.0f}", peak <= limit
    yield "limit, 3 GB + 2 layers in bf16, MB", f"{limit / 1e6:.0f}", True
    yield "float pass, seconds", f"{float_seconds:.1f}", True
    yield "conversion, seconds", f"{seconds:.1f}", True
    yield f"conversion in float passes, at most {MOST_PASSES:g}", f"{passes:.2f}", passes <= MOST_PASSES


def parse_flags() -> argparse.Namespace:
    """The flags; `conversion` holds what follows `--`."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory to make for everything that is written")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--texts", type=int, default=16, help="calibration texts, the last of which are held back")
    parser.add_argument("--keep", action="store_true", help="leave what was written")
    flags = parser.parse_args(sys.argv[1:split])
    flags.conversion = sys.argv[split + 1 :]
    if flags.work.exists() and any(flags.work.iterdir()):
        parser.error(f"--work {flags.work}: holds something already")
    return flags


def main() -> int:
    """Write, measure, print; exit code 1 if a limit is broken."""
    flags = parse_flags()
    flags.work.mkdir(parents=True, exist_ok=True)
    try:
        rows = list(measured(flags.work, flags))
    finally:
        if not flags.keep:
            shutil.rmtree(flags.work)
    for line, (_, _, is_within) in zip(aligned([row[:2] for row in rows], texts=1), rows, strict=True):
        print(line if is_within else f"{line}  over the limit")
    return int(not all(is_within for _, _, is_within in rows))


if __name__ == "__main__":
    sys.exit(main())
