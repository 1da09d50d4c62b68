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
        is_norm: whether the producer is a norm.
        router: of the consumers, the one that is given all inputs, of which the others, experts, have some each; it
            stays in float, and since it has no bias that would take a shift back, inputs are not shifted.
        by_heads: whether what is read is made of heads, which several heads of the consumers' inputs may share.
    """

    producer: str
    consumers: tuple[str, ...]
    part: str = ""
    is_norm: bool = False
    router: str = ""
    by_heads: bool = False


def norm_subgraphs(decoder: Decoder, experts: int = 0) -> tuple[Subgraph, Subgraph]:
    """The norms before attention and before the MLP, with their linears.

    Args:
        experts: of the layer, see `Decoder.experts_in`.
    """
    mlp, router = [name for facts in decoder.mlps(experts) for name in facts.inputs], ""
    if experts:
        router = decoder.experts.router
        mlp = [router, *mlp]
    return (
        Subgraph(decoder.attention_norm, decoder.attention.inputs, is_norm=True),
        Subgraph(decoder.mlp_norm, tuple(mlp), is_norm=True, router=router),
    )


def shifted_subgraphs(decoder: Decoder, experts: int = 0) -> tuple[Subgraph, ...]:
    """Those of `norm_subgraphs` whose inputs may be shifted."""
    return tuple(subgraph for subgraph in norm_subgraphs(decoder, experts) if not subgraph.router)


def value_output(decoder: Decoder) -> Subgraph:
    """v, and the projection behind attention, whose weights of tokens leave channels apart."""
    facts = decoder.attention
    return Subgraph(facts.value, (facts.output,), "value" if facts.is_fused else "", by_heads=True)


def up_down(decoder: Decoder, experts: int = 0) -> tuple[Subgraph, ...]:
    """The half of each MLP that its gate multiplies, and the last linear."""
    return tuple(Subgraph(facts.up, (facts.down,), "up" if facts.is_fused else "") for facts in decoder.mlps(experts))


def backwards(decoder: Decoder, experts: int = 0) -> tuple[Subgraph, ...]:
    """All subgraphs, such that weights which a scale is made of are those that earlier rewrites left."""
    return (*up_down(decoder, experts), value_output(decoder), *norm_subgraphs(decoder, experts))


def forwards(decoder: Decoder, experts: int = 0) -> tuple[Subgraph, ...]:
    """All subgraphs, such that errors of v and up are weighed before a scale of what they feed changes their units."""
    before_attention, before_mlp = norm_subgraphs(decoder, experts)
    return (before_attention, value_output(decoder), before_mlp, *up_down(decoder, experts))
