"""Measure whole models beside other engines on this machine's CPU, in turns: decode, first token, memory, and KL.

    python benchmarks/engines.py --models DIR [DIR ...] --eval_file TEXT --calib_file TEXTS [--random]

A turn is a process of its own: an engine loads a model, warms up on another prompt, reads a prompt, and decodes so many
steps, greedy, on so many threads. Rounds go over all contenders, so that what a machine does meanwhile hits them alike;
figures are medians over the steps of all rounds. Prompts are the same ids everywhere, out of the text. Timed is what
users call: `generate` of transformers and of OpenVINO GenAI, the engine's steps of vLLM in process, and passes of
llama.cpp. KL(float32 || contender) in nats is over the second halves of windows of the text, read in chunks behind the
first, so that what is in the cache is read as it is stored.

Turns are kept in a journal as they come, so that a run that is cut off goes on where it was, and `--turns N` does some
of them. An engine that is missing or fails is told with its reason, on the way and in the row.
"""

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

import torch
from engine_cases import AVX2, CONTENDERS, KINDS, NATIVE, RANDOM, write_random_model
from engine_files import Model
from engine_turns import Run

CONTEXTS, ROUNDS = (2048, 8192, 32768), (5, 3, 1)


def parse_flags() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True, help="directories of Llama and Qwen2 models")
    parser.add_argument("--eval_file", type=Path, required=True, help="text for prompts and KL")
    parser.add_argument("--calib_file", type=Path, required=True, help="texts for our conversions")
    parser.add_argument(
        "--random", action="store_true", help="also a Llama of 1B's shape and random weights, speed only"
    )
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS), help="tokens of prompts")
    parser.add_argument("--rounds", nargs="+", type=int, default=list(ROUNDS), help="of each context")
    parser.add_argument("--new", type=int, default=24, help="steps of a turn")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=(NATIVE, AVX2), default=NATIVE, help="instructions that all are limited to")
    parser.add_argument("--windows", type=int, default=2, help="of 2,048 tokens, for KL")
    parser.add_argument("--only", nargs="+", default=["*"], help="contenders, by patterns of their names")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--do", nargs="+", choices=list(STAGES), default=list(STAGES), help="stages")
    parser.add_argument("--tries", type=int, default=2, help="of a turn while other processes keep a CPU busy")
    parser.add_argument("--turns", type=int, default=sys.maxsize, help="turns to do at most; no rows then")
    parser.add_argument("--again", action="store_true", help="start the journal anew")
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/engines/work"), help="prepared models and the journal"
    )
    parser.add_argument("--environments", type=Path, default=Path(".cache/engines"))
    flags = parser.parse_args()
    if len(flags.rounds) != len(flags.contexts):
        parser.error(f"--rounds: {len(flags.rounds)} numbers for {len(flags.contexts)} of --contexts")
    flags.contenders = [
        one for one in CONTENDERS if one.kind in flags.kinds and any(fnmatch(one.name, part) for part in flags.only)
    ]
    if not flags.contenders:
        parser.error(f"--only {' '.join(flags.only)}: no contender has such a name")
    return flags


def models(flags: argparse.Namespace) -> list[Model]:
    """The checkpoints, the random one made if it is not there."""
    found = [Model(directory.resolve().name, directory) for directory in flags.models]
    if flags.random:
        target = flags.work / RANDOM / "source"
        if not target.exists():
            write_random_model(target, flags.models[0])
        found.append(Model(RANDOM, target))
    return found


STAGES = {"prepare": Run.prepare, "score": Run.score, "time": Run.time, "report": Run.report}


def main() -> int:
    """Do the stages."""
    flags = parse_flags()
    torch.set_num_threads(flags.threads)
    run = Run(flags, models(flags))
    for stage in flags.do:
        if not STAGES[stage](run):
            print("not all turns are done; the same command goes on", flush=True)
            break
    run.tell_failures()
    return 0


if __name__ == "__main__":
    sys.exit(main())
