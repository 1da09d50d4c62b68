"""`octavo presets [NAME]`: sets of flags of a conversion by name, what each is for, and what it stands for."""

import argparse
import json
from typing import Any

from ..common.command import aligned
from ..common.convert.flags import recipe_fields
from ..common.convert.presets import RECIPES, RENAMED, USUAL, check_preset, load_recipe
from ..common.runtime.schemes.kv_scheme import load_scheme
from ..common.runtime.schemes.linear_scheme import WEIGHT_ONLY, LinearScheme

HEADER = ("preset", "linears", "embeddings", "K and V", "texts", "what it is for")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Let a parser take a preset, or none."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a preset: the flags that it stands for")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")


def facts_of(name: str) -> dict[str, Any]:
    """What there is to say of a preset, as plain data."""
    fields, recipe = recipe_fields(name), load_recipe(name)
    linear: LinearScheme = fields.get("linear", LinearScheme())
    scheme, method = load_scheme(fields["scheme"]), fields.get("anti_method", "")
    is_weight_only = linear.label in WEIGHT_ONLY and linear.w_method != "GPTQ"
    return {
        "name": name,
        "linears": linear.label + (f" x {linear.group_size}" if linear.group_size else ""),
        "embeddings": fields.get("embeddings", "float"),
        "scheme": scheme.name,
        "needs_calibration": scheme.is_static or bool(method) or not is_weight_only,
        "about": recipe["about"],
        "flags": {flag: value for flag, value in recipe.items() if flag != "about"},
    }


def table() -> list[str]:
    """All presets, in lines."""
    found = [facts_of(name) for name in RECIPES]
    rows = [
        (f["name"], f["linears"], f["embeddings"], f["scheme"], "yes" if f["needs_calibration"] else "", f["about"])
        for f in found
    ]
    return [
        *aligned([HEADER, *rows]),
        "",
        f"octavo convert MODEL takes {USUAL}, --preset NAME another; flags beside it take the place of its own.",
        "texts: what it writes depends on calibration texts (--calib_file); x N: groups of N input channels.",
        f"called otherwise before: {', '.join(f'{old} ({new})' for old, new in RENAMED.items())}.",
    ]


def description(name: str) -> list[str]:
    """One preset, and its flags as they are typed, in lines."""
    facts = facts_of(name)
    flags = [f"--{flag} {value}" for flag, value in facts["flags"].items()]
    return [f"{name}: {facts['about']}", "", "stands for", *(f"  {flag}" for flag in flags)]


def run(flags: argparse.Namespace) -> None:
    """Print the table of all presets, or the flags of one.

    Raises:
        OctavoError: there is no such preset; the message has the nearest.
    """
    name = None if flags.name is None else RENAMED.get(check_preset(flags.name), flags.name)
    if flags.json:
        print(json.dumps(facts_of(name) if name else [facts_of(each) for each in RECIPES], indent=2))
        return
    print("\n".join(description(name) if name else table()))
