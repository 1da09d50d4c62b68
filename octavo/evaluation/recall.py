"""Whether a model finds again what it read: pairs in a list, and needles in a text that says nothing.

Both are made on the spot, of any length. A cache shows damage here before perplexity does. "Lost in the Middle" (Liu et
al. 2023) asks for values by keys, "Landmark Attention" (Mohtashami and Jaggi 2023) for a pass key in idle sentences.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from tqdm import tqdm

from ..common.errors import OctavoError
from ..generate import Speaker
from .reading import Reader, Times

ASKED = 10
"""Questions on one prompt, which is read once for all of them."""
ROOM = 56
"""Tokens left for a question and its answer, fewer than what any cache can crop."""
DIGITS = 5
Z = 1.959964
"""Of a normal distribution, 95 % of which lie nearer to the middle, in standard deviations."""
_ADJECTIVES = (
    *("red", "old", "tall", "warm", "quiet", "small", "green", "sharp", "early", "round", "plain", "heavy", "blue"),
    *("dark", "cold", "loud", "large", "white", "dull", "late", "flat", "fancy", "light", "young", "short", "cool"),
    *("busy", "tiny", "black", "blunt", "square", "rich"),
)
_NOUNS = (
    *("river", "stone", "garden", "window", "lantern", "bridge", "harbour", "meadow", "kettle", "ladder", "mirror"),
    *("forest", "castle", "market", "tunnel", "engine", "blanket", "hammer", "island", "pencil", "bottle", "carpet"),
    *("statue", "button", "temple", "ribbon", "tower", "basket", "candle", "fountain", "saddle", "orchard"),
)
_IDLE = "The wind moved over the field. A cart stood by the gate. Nobody came along the road that day. "


@dataclass(frozen=True)
class Prompt:
    """A text, and what is asked about it.

    Attributes:
        text: what is read once.
        questions: each with the digits that answer it.
    """

    text: str
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Score:
    """How many answers of how many were right."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share by Wilson's score, which holds near 0 and 1 as well."""
        n, p = self.asked, self.share
        middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return max(0.0, middle - half), min(1.0, middle + half)


def _number(chance: random.Random) -> str:
    return "".join(str(chance.randrange(10)) for _ in range(DIGITS))


def key_values(size: int, chance: random.Random, asked: int = ASKED) -> Prompt:
    """A list of so many pairs; the keys that are asked for lie all over it."""
    keys = list(islice(_keys(), size))  # of one length of prompts the same, so that all are as long
    chance.shuffle(keys)
    pairs = [(key, _number(chance)) for key in keys]
    lines = "".join(f"The number of the {key} is {value}.\n" for key, value in pairs)
    asked = min(asked, size)
    found = [pairs[int((index + chance.random()) * size / asked)] for index in range(asked)]
    questions = tuple((f"\nAgain, the number of the {key} is", value) for key, value in found)
    return Prompt(f"Here is a list of numbers.\n{lines}", questions)


def _keys() -> Iterator[str]:
    """Names without end, none of them twice: those of two words, mixed, and then those with a number as well."""
    names = [f"{first} {second}" for first in _ADJECTIVES for second in _NOUNS]
    random.Random(0).shuffle(names)
    yield from names
    yield from (f"{name} {number}" for number in count(2) for name in names)


def needles(size: int, chance: random.Random) -> Prompt:
    """So many idle sentences, and some pairs in their midst, anywhere."""
    pairs = key_values(min(ASKED, size), chance)
    lines = pairs.text.splitlines(keepends=True)[1:]
    sentences = [_IDLE] * size
    for line, place in zip(lines, sorted(chance.sample(range(size), len(lines))), strict=True):
        sentences[place] = f"{_IDLE}{line.strip()} "
    return Prompt(f"Some numbers are hidden in this text.\n{''.join(sentences)}", pairs.questions)


TASKS: dict[str, Callable[[int, random.Random], Prompt]] = {"key-value": key_values, "needles": needles}


def prompts_of(task: str, tokenizer: Any, length: int, trials: int, seed: int = 0) -> list[Prompt]:
    """Prompts with `trials` questions in all, as long as fit into `length` tokens with question and answer.

    Raises:
        OctavoError: no prompt is as short as that.
    """
    make, found, asked = TASKS[task], [], 0
    size = largest(lambda count: make(count, random.Random(seed)), tokenizer, length - ROOM)
    if size < 1:
        raise OctavoError(f"--lengths {length}: too short for {task}; give 256 or more")
    while asked < trials:
        prompt = make(size, random.Random(f"{seed} {len(found)}"))
        found.append(Prompt(prompt.text, prompt.questions[: trials - asked]))
        asked += len(found[-1].questions)
    return found


def largest(make: Callable[[int], Prompt], tokenizer: Any, tokens: int) -> int:
    """The most parts with which a prompt that `make` gives has so many tokens at most."""
    low, high = 0, max(1, tokens)
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokenizer(make(middle).text)["input_ids"]) <= tokens:
            low = middle
        else:
            high = middle - 1
    return low


def recall(
    speaker: Speaker, prompts: Sequence[Prompt], what: str = "recall", times: Times | None = None
) -> tuple[Score, int]:
    """How many questions a model answers, greedily, and the bytes that its cache had at most."""
    right, most = 0, 0
    for prompt in tqdm(prompts, desc=what, unit="prompt", leave=False):
        found, nbytes = answers(speaker, prompt, times)
        right, most = right + sum(found), max(most, nbytes)
    return Score(right, sum(len(prompt.questions) for prompt in prompts)), most


def answers(speaker: Speaker, prompt: Prompt, times: Times | None = None) -> tuple[list[bool], int]:
    """Whether each question on a prompt, which is read once, is answered, and the bytes of the cache that holds it."""
    reader = Reader(speaker, times)
    ids = reader.ids_of(prompt.text)
    reader.read(ids)
    nbytes = reader.cache.nbytes()
    return [_is_right(reader, len(ids), *question) for question in prompt.questions], nbytes


def _is_right(reader: Reader, length: int, question: str, answer: str) -> bool:
    """Whether a question behind a prompt of so many tokens is answered; the prompt alone stays in the cache."""
    found = reader.write(reader.read(reader.ids_of(question, add_special_tokens=False)), DIGITS + 3)
    reader.forget(length)
    return reader.text_of(found).strip().startswith(answer)
