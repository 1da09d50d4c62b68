"""What follows from the definition of a call: the flat arguments that torch.library knows, and their schema.

A call of an op is one NamedTuple of tensors, numbers and NamedTuples of such, which is made and read as fast as a
tuple. That is the definition; what else has to say the same is derived from it here, and in `packed_call.py` for C, or
checked against it at import.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

import torch

Call = TypeVar("Call")
"""The type of a call."""


class Leaf(NamedTuple):
    """A tensor or number of a call.

    Attributes:
        path: names of the fields down to it.
        name: of the flat argument.
        annotation: its type.
        default: its value where a caller gives none, or `inspect.Parameter.empty`.
    """

    path: tuple[str, ...]
    name: str
    annotation: Any
    default: Any

    @property
    def place(self) -> str:
        """Its fields as one writes them, `key.scale`."""
        return ".".join(self.path)

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor, or None."""
        return self.annotation is torch.Tensor or torch.Tensor in typing.get_args(self.annotation)


def is_call_part(annotation: Any) -> bool:
    """Whether the type of a field is a NamedTuple of further fields."""
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


def call_leaves(definition: type, nameless: tuple[str, ...], path: tuple[str, ...] = ()) -> list[Leaf]:
    """The tensors and numbers of a definition, in its order; fields in `nameless` are left out of their names."""
    leaves: list[Leaf] = []
    for field, annotation in typing.get_type_hints(definition).items():
        here, default = (*path, field), definition._field_defaults.get(field, inspect.Parameter.empty)
        if not is_call_part(annotation):
            name = "_".join(part for part in here if part not in nameless)
            leaves.append(Leaf(here, name, annotation, default))
            continue
        for leaf in call_leaves(annotation, nameless, here):
            if default is not inspect.Parameter.empty:
                leaf = leaf._replace(default=attrgetter(leaf.place.removeprefix(".".join(here) + "."))(default))
            leaves.append(leaf)
    return leaves


def _maker(definition: type, numbers: dict[tuple[str, ...], int], path: tuple[str, ...] = ()) -> Callable[[tuple], Any]:
    """What makes a NamedTuple of flat arguments; `numbers` says which of them each leaf is."""
    new, hints = tuple.__new__, typing.get_type_hints(definition)
    if not any(map(is_call_part, hints.values())):
        pick = itemgetter(*[numbers[(*path, field)] for field in hints])
        return lambda values: new(definition, pick(values))
    parts = [
        _maker(annotation, numbers, (*path, field)) if is_call_part(annotation) else itemgetter(numbers[(*path, field)])
        for field, annotation in hints.items()
    ]
    return lambda values: new(definition, [part(values) for part in parts])


class CallForm(Generic[Call]):
    """The flat arguments of a call, and how one becomes the other.

    What every call gives comes first, then what has a default, each in the order of the definition.

    Args:
        definition: the NamedTuple.
        nameless: fields whose names are no part of those of flat arguments; other names are joined by `_`.
    """

    def __init__(self, definition: type[Call], nameless: tuple[str, ...] = ()) -> None:
        empty = inspect.Parameter.empty
        self.definition = definition
        self.leaves = call_leaves(definition, nameless)
        ordered = sorted(self.leaves, key=lambda leaf: leaf.default is not empty)
        self.signature = inspect.Signature([
            inspect.Parameter(
                leaf.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=leaf.default, annotation=leaf.annotation
            )
            for leaf in ordered
        ])  # fmt: skip
        self._paths = tuple(leaf.path for leaf in ordered)
        self._flat = attrgetter(*[leaf.place for leaf in ordered])
        self._defaults = tuple(leaf.default for leaf in ordered)
        self._made = _maker(definition, {leaf.path: number for number, leaf in enumerate(ordered)})

    def flat(self, call: Call) -> tuple:
        """The flat arguments of a call."""
        if torch.compiler.is_compiling():  # it knows no attrgetter
            return tuple([functools.reduce(getattr, path, call) for path in self._paths])
        return self._flat(call)

    def of(self, *values: Any, **named: Any) -> Call:
        """The call of flat arguments.

        Raises:
            TypeError: an argument that there is not, or one that is missing.
        """
        bound = self.signature.bind(*values, **named)
        bound.apply_defaults()
        return self._made(tuple(bound.arguments.values()))

    def from_flat(self, values: Sequence) -> Call:
        """The call of all flat arguments."""
        return self._made(values)

    def schema(self, name: str, returns: Any) -> str:
        """The schema of an op of such calls that returns a type."""

        def prototype() -> None: ...

        prototype.__signature__ = self.signature.replace(return_annotation=returns)
        schema = torch.library.infer_schema(prototype, mutates_args=())
        return name + schema.replace("SymInt", "int")  # in a graph, numbers are constants

    def check(self, function: Callable, returns: Any) -> None:
        """Raise TypeError unless a function takes a call alone, and returns a type."""
        hints = typing.get_type_hints(function)
        found = [hints.get(name) for name in inspect.signature(function).parameters], hints.get("return")
        if found != ([self.definition], returns):
            raise TypeError(
                f"{function.__name__} must be of (call: {self.definition.__name__}) -> {returns}, not of {found[0]} -> "
                f"{found[1]}"
            )

    def flattened(self, function: Callable[[Call], Any]) -> Callable[..., Any]:
        """A function of a call as torch.library calls it: with flat arguments, of which the last may be missing."""
        made, defaults = self._made, self._defaults
        return lambda *values: function(made(values + defaults[len(values) :]))
