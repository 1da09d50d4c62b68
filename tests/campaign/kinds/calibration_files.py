"""Damage of calibration files: odd characters, encodings, forms of JSON, bytes. What is read is what was written."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from octavo.common.convert.calibration.texts import TEXT_KEY, read_calibration_file

from ..json_damage import wrong_value
from ..trial import Accepted, Attempt, Expect, Room

ODD = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\x1f", "\t", "\u00a0", "\u200b", "\ufeff", "\x00",
       "\x1b[0m", "\U0001f600", "e\u0301", "\\n", '"', "{", "[", "[1] ", "{'a': 1}", "\u202e", "\ufffd")  # fmt: skip
WORDS = ["the", "sea", "wrote", "back", "at", "night", "and", "nobody", "in", "harbour", "could", "read", "it"]
Form = Callable[[Sequence[str]], str]


def _plain(texts: Sequence[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def _objects(texts: Sequence[str], ascii_only: bool) -> str:
    return "".join(json.dumps({TEXT_KEY: text}, ensure_ascii=ascii_only) + "\n" for text in texts)


FORMS: dict[str, Form] = {
    "plain": _plain,
    "plain, no line end at the end": lambda texts: "\n".join(texts),
    "plain, blank last line": lambda texts: _plain(texts) + "\n",
    "plain, lines that end as on Windows": lambda texts: "".join(f"{text}\r\n" for text in texts),
    "objects": lambda texts: _objects(texts, True),
    "objects, not escaped": lambda texts: _objects(texts, False),
    "objects among plain lines": lambda texts: _plain(texts[:1]) + _objects(texts[1:], True),
    "one array of texts": lambda texts: json.dumps(list(texts)),
    "one array of objects": lambda texts: json.dumps([{TEXT_KEY: text} for text in texts], indent=1),
    "indented objects": lambda texts: "\n".join(json.dumps({TEXT_KEY: text}, indent=1) for text in texts),
}
ENCODINGS = ("utf-8",) * 6 + ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037")


def _texts(rng: Random) -> list[str]:
    texts = []
    for _ in range(rng.randint(1, 4)):
        words = rng.choices(WORDS, k=rng.randint(2, 9))
        if rng.random() < 0.5:
            words.insert(rng.randint(1, len(words) - 1), rng.choice(ODD))
        if rng.random() < 0.1:
            words.insert(0, rng.choice(ODD))
        texts.append(rng.choice([" ", " ", ""]).join(words))
    return texts


def _bare(texts: Sequence[str]) -> list[str]:
    """Texts without what a file may have around them: a byte order mark, and spaces or a carriage return at the end."""
    return [text.removeprefix("\ufeff").rstrip() for text in texts]


def _read(file: Path, *expected: Sequence[str]) -> Accepted:
    """Read a file; `expected` are the texts that it may hold, one list or another."""
    found = _bare(read_calibration_file(file))
    is_right = any(found == _bare(texts) for texts in expected)
    return Accepted(is_right, "" if is_right else f"{len(found)} texts {str(found)[:300]}")


def _well_formed(rng: Random, file: Path) -> Attempt:
    """Texts written in some form and encoding: read as they are, or refused."""
    texts, form = _texts(rng), rng.choice(list(FORMS))
    encoding = rng.choice(ENCODINGS)
    file.write_bytes(FORMS[form](texts).encode(encoding, errors="xmlcharrefreplace"))
    # What an encoding has no character for is written as "&#8232;", unless JSON has escaped it.
    as_written = [text.encode(encoding, errors="xmlcharrefreplace").decode(encoding) for text in texts]
    what = f"{form} in {encoding}: {str(texts)[:150]}"
    return Attempt(what, functools.partial(_read, file, texts, as_written))


def _objects_with_damage(rng: Random, file: Path) -> Attempt:
    """A line whose object has no text under its key."""
    texts = _texts(rng)
    lines = _objects(texts, True).splitlines()
    place = rng.randrange(len(lines))
    value = wrong_value(rng, None)
    value = 0 if isinstance(value, str) else value
    lines[place] = json.dumps(rng.choice([{TEXT_KEY: value}, {"text": texts[place]}, {}, {TEXT_KEY: " "}]))
    file.write_text("\n".join(lines))
    what = f"line {place + 1} is {lines[place][:60]}"
    return Attempt(what, functools.partial(_read, file, texts), Expect.REFUSAL)


def _bytes_with_damage(rng: Random, file: Path) -> Attempt:
    """Bytes that are no text, or nothing at all."""
    data = _plain(_texts(rng)).encode()
    place = rng.randrange(len(data))
    ways = {
        "empty": b"",
        "blank lines": b"\n \n\t\n",
        "random bytes": rng.randbytes(300) + b"\xff",
        "a byte that is no UTF-8": data[:place] + b"\xc3\xff" + data[place:],
        "half a character": data + "\u00e9".encode()[:1],
        "a surrogate": data + b"\xed\xa0\x80",
        "a zero byte": data[:place] + b"\0" + data[place:],
        "deep JSON": b'{"inputs_pretokenized":' + b"[" * 20_000,
    }
    what = rng.choice(list(ways))
    file.write_bytes(ways[what])
    return Attempt(what, functools.partial(_read, file), Expect.REFUSAL)


def _no_file(rng: Random, file: Path) -> Attempt:
    """A file that is none."""
    way = rng.choice(("missing", "a directory", "a link to itself"))
    if way == "a directory":
        file.mkdir()
    elif way == "a link to itself":
        file.symlink_to(file)
    return Attempt(way, functools.partial(_read, file), Expect.REFUSAL)


def calibration(rng: Random, room: Room) -> Attempt:
    """A calibration file."""
    file = room.scratch / "calibration.txt"
    make = rng.choices((_well_formed, _objects_with_damage, _bytes_with_damage, _no_file), (6, 2, 2, 1))[0]
    return make(rng, file)
