"""Sets of flags by name, the values of `--preset`: what each is for, and the flags that it stands for."""

import json
import sys
from functools import cache
from typing import Any

from ...ops.shared.resources import resource
from ..errors import OctavoError, did_you_mean

RECIPES = ("eight-bit", "four-bit", "smallest", "w8a8-c8", "w8a8-fp8", "ascend", "ascend-fa")
"""Names of the files in `recipes/`, in the order in which they are listed."""
USUAL = RECIPES[0]
"""What most should take."""
RENAMED = {"memory-first": "four-bit", "balanced": "smallest", "speed-first": "w8a8-fp8"}
"""Names of earlier versions, which said something else than what they did."""


def check_preset(name: str) -> str:
    """The name as it is, today's or an earlier one.

    Raises:
        OctavoError: there is no such preset; the message lists those there are.
    """
    if name not in (*RECIPES, *RENAMED):
        raise OctavoError(f"preset {name}: is none of {', '.join(RECIPES)}{did_you_mean(name, (*RECIPES, *RENAMED))}")
    return name


@cache
def _told(name: str) -> None:
    """Say once in a process that a preset has another name today."""
    print(f"preset {name} is called {RENAMED[name]} now; the old name goes on working", file=sys.stderr)


def load_recipe(name: str) -> dict[str, Any]:
    """The flags of a preset, and under "about" what it is for; an old name is told of on stderr.

    Raises:
        OctavoError: see `check_preset`.
    """
    if check_preset(name) in RENAMED:
        _told(name)
    return json.loads(resource(f"common/convert/recipes/{RENAMED.get(name, name)}.json"))
