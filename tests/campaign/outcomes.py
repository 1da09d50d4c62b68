"""How a try may end.

Good ends:

    refused   one line that a user can act on: one `OctavoError`; of a script an exit code and one line `error: ...`; of
              an op a ValueError, IndexError, TypeError or NotImplementedError of one line.
    foreign   refused by transformers before any code of Octavo ran (`AutoModelForCausalLM` reads config.json first).
    caught    refused in one line by the last resort of a script, which names no file and no way out.
    equal     accepted, and what came out is what the undamaged one gives.
    meant     accepted with another result, where the change means something or no check can know of it: that, and no
              more, is listed below.

What is meant, of a config: another base or factor of RoPE, epsilon of norms or size of a sliding window that is a
positive number; a sliding window switched on or off; a prefill in float. Of tensors: a bit of a code, of a bias in
int32, or of a float that stays finite (and of a scale positive); floats of 16 bits read as the other type of 16 bits; a
zero among maxima. Of a tokenizer: one that loads and gives other tokens.

Two kinds have no right result to compare with, and end as "equal" if what comes out is sound. A scheme file with other
values may be another valid scheme: it has to run with finite logits, and to be itself when written and read. A command
line may ask for another conversion: its output has to load and to be near the float model.

Every other end is a failure.
"""

from dataclasses import asdict, dataclass

REFUSED, FOREIGN, CAUGHT, EQUAL, MEANT = "refused", "foreign", "caught", "equal", "meant"
GOOD = (REFUSED, FOREIGN, CAUGHT, EQUAL, MEANT)
SILENT = "silent"
"""Accepted with another result, or in spite of damage that must not pass."""
TRACEBACK = "traceback"
"""Any other exception, or a refusal of several lines."""
HANG, CRASH, MEMORY = "hang", "crash", "memory"
LEFT = "left"
"""Refused, with files left behind where the output was to be."""
BROKEN = "broken"
"""The campaign itself failed to prepare the try."""
BAD = (SILENT, TRACEBACK, HANG, CRASH, MEMORY, LEFT, BROKEN)


@dataclass(frozen=True)
class Result:
    """The end of a try.

    Attributes:
        number: of the try.
        kind: as in `KINDS`.
        what: what was done, in words.
        end: one of `GOOD` or `BAD`.
        detail: the line of a refusal, what differs, or where it failed.
        seconds: of processor time.
        megabytes: by which the peak of resident memory rose.
    """

    number: int
    kind: str
    what: str
    end: str
    detail: str
    seconds: float = 0.0
    megabytes: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether this is no failure."""
        return self.end in GOOD

    def to_dict(self) -> dict[str, int | float | str]:
        """Plain data."""
        return asdict(self)
