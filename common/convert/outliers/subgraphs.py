"""Which subgraphs of a decoder layer may be rewritten, by what its architecture states."""

from dataclasses import dataclass

from ...runtime.decoder import Decoder


@dataclass(frozen=True)
class Subgraph:
    """A producer and all linears that read what it makes, by their names in a decoder layer.

    Attributes:
        producer: a norm, or a linear.
        consumers: the linears.
        part: of a linear that makes several things in one, the one that is read: "value" or "up"; "" of all others.
        is_norm: whether the producer is a norm, which inputs may be shifted by.
        by_heads: whether what is read is made of heads, which several heads of the consumers' inputs may share.
    """

    producer: str
    consumers: tuple[str, ...]
    part: str = ""
    is_norm: bool = False
    by_heads: bool = False


def norm_subgraphs(decoder: Decoder) -> tuple[Subgraph, Subgraph]:
    """The norms before attention and before the MLP, with their linears."""
    return (
        Subgraph(decoder.attention_norm, decoder.attention.inputs, is_norm=True),
        Subgraph(decoder.mlp_norm, decoder.mlp.inputs, is_norm=True),
    )


def value_output(decoder: Decoder) -> Subgraph:
    """v, and the projection behind attention, whose weights of tokens leave channels apart."""
    facts = decoder.attention
    return Subgraph(facts.value, (facts.output,), "value" if facts.is_fused else "", by_heads=True)


def up_down(decoder: Decoder) -> Subgraph:
    """The half of the MLP that its gate multiplies, and the last linear."""
    facts = decoder.mlp
    return Subgraph(facts.up, (facts.down,), "up" if facts.is_fused else "")


def backwards(decoder: Decoder) -> tuple[Subgraph, ...]:
    """All subgraphs, such that weights which a scale is made of are those that earlier rewrites left."""
    return (up_down(decoder), value_output(decoder), *norm_subgraphs(decoder))


def forwards(decoder: Decoder) -> tuple[Subgraph, ...]:
    """All subgraphs, such that errors of v and up are weighed before a scale of what they feed changes their units."""
    before_attention, before_mlp = norm_subgraphs(decoder)
    return (before_attention, value_output(decoder), before_mlp, up_down(decoder))
