"""The options of a preset or a scheme, one after the other: what is measured to tell what each of them adds."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.convert.flags import SCHEME_FLAGS
from ..common.convert.presets import RECIPES, RENAMED, check_preset, load_recipe
from ..common.errors import OctavoError, did_you_mean
from ..common.runtime.schemes.kv_scheme import KV_CACHE_DTYPES, PRESETS, Scheme, load_scheme

CACHE, LINEARS, CODES = "cache", "linears", "codes"
_FLAGS = {
    CACHE: SCHEME_FLAGS,
    LINEARS: ("quantization", "w_bit", "a_bit", "is_dynamic", "group_size", "w_sym", "scale_bits"),
    "outliers": ("anti_method",),
    "rounding": ("w_method",),
    "embeddings": ("embeddings",),
    "lm_head": ("disable_last_linear",),
}
"""Options of a preset in the order in which they are added, and the flags that state them."""
_AWAY = {
    LINEARS: ("--w_bit", "16", "--a_bit", "16", "--is_dynamic", "False"),
    "outliers": ("--anti_method", ""),
    "rounding": ("--w_method", "MinMax"),
    "embeddings": ("--embeddings", "float"),
    "lm_head": ("--disable_last_linear", "True"),
}
"""Flags that take an option of a preset away."""
_FIELDS: dict[str, dict[str, Any]] = {
    "rotation": {"rotate_key": False, "rotate_value": False},
    "smoothing": {"smooth_key": False},
    "centering": {"center_key": False},
    "bases": {"key_basis": "", "value_basis": ""},
    "sinks": {"sinks": 0},
    "window": {"window": 0},
}
"""Options of a scheme in the order in which they are added to its codes, and the fields that take them away."""


@dataclass(frozen=True)
class Step:
    """A preset or a scheme up to one of its options, those behind it taken away.

    Attributes:
        of: name of the preset or scheme.
        option: the last that is in.
        about: what states it.
        away: flags that take those of a preset away that are not in.
        scheme: of the cache, where it is a scheme that is taken up.
    """

    of: str
    option: str
    about: str
    away: tuple[str, ...] = ()
    scheme: Scheme | None = None

    @property
    def name(self) -> str:
        """Of the results."""
        return f"{self.of} up to {self.option}"

    def as_json(self) -> dict[str, str]:
        """What a record keeps of it."""
        return {"of": self.of, "option": self.option, "stated": self.about}


def _stated(recipe: Mapping[str, Any], flags: Sequence[str]) -> str:
    return " ".join(f"--{flag} {recipe[flag]}" for flag in flags if flag in recipe)


def preset_steps(name: str) -> list[Step]:
    """A preset up to each of its options, itself the last; its scheme comes first, as it works on any linears."""
    recipe = load_recipe(name)
    options = [option for option, flags in _FLAGS.items() if option == LINEARS or any(flag in recipe for flag in flags)]
    found = []
    for index, option in enumerate(options):
        away = tuple(word for other in options[index + 1 :] for word in _AWAY[other])
        found.append(Step(name, option, _stated(recipe, _FLAGS[option]) or "static W8A8", away))
    return found


def scheme_steps(scheme: Scheme) -> list[Step]:
    """A scheme up to each of its options, the codes first and the scheme itself last.

    Raises:
        OctavoError: it codes nothing, or layers differ, of which each has options of its own.
    """
    if not scheme.is_quantized or scheme.layers:
        reason = "its layers differ" if scheme.layers else "it codes nothing"
        raise OctavoError(f"--options {scheme.name}: {reason}; take a scheme whose layers have the same options")
    options = {
        option: fields
        for option, fields in _FIELDS.items()
        if any(getattr(scheme, field) != value for field, value in fields.items())
    }
    bare = {field: value for fields in options.values() for field, value in fields.items()}
    found = []
    for option in (CODES, *options):
        back = options.get(option, {})
        bare = {field: value for field, value in bare.items() if field not in back}
        about = ", ".join(f"{field} {getattr(scheme, field)}" for field in back if getattr(scheme, field))
        step = Step(scheme.name, option, about or "nothing but its codes")
        found.append(dataclasses.replace(step, scheme=dataclasses.replace(scheme, name=step.name, **bare)))
    return found


def steps_of(name: str) -> list[Step]:
    """The steps of a preset or of a scheme, by its name or its JSON file.

    Raises:
        OctavoError: there is neither of the name, or a file holds no scheme.
    """
    if name in (*RECIPES, *RENAMED):
        return preset_steps(RENAMED.get(check_preset(name), name))
    if name in (*PRESETS, *KV_CACHE_DTYPES) or name.endswith(".json"):
        return scheme_steps(load_scheme(name))
    known = (*RECIPES, *PRESETS)
    raise OctavoError(f"--options {name}: is neither a preset nor a scheme{did_you_mean(name, known)}")
