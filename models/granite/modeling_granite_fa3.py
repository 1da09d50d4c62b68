"""Granite with a quantized KV cache, quantized attention and quantized linears.

    hidden [B, S, hidden]             embeddings times `embedding_multiplier`, by which the decoder multiplies them
      -> q_proj, k_proj, v_proj       on codes, in the kind that the checkpoint says
      -> RoPE on q [B, H, S, D] and k [B, G, S, D]
      -> cache.update(k, v)           encodes the new tokens once; returns the codes of all
      -> attention(q, codes)          reads the codes; scores are times `attention_multiplier`
      -> o_proj, times `residual_multiplier`; likewise the MLP

"fa3" is Ascend's word for 8-bit per-head attention quantization (FAQuant), not FlashAttention-3. Logits are divided by
`logits_scaling`.
"""

from typing import Any

import transformers

from ...common.runtime.decoder import AttentionFacts, Decoder, MlpFacts
from ...common.runtime.model import QuantizedCausalLM


def _states_scale(config: Any) -> float:
    return config.embedding_multiplier


def _residual_scale(config: Any) -> float:
    return config.residual_multiplier


def _logits_divisor(config: Any) -> float:
    return config.logits_scaling


class GraniteForCausalLM(QuantizedCausalLM, transformers.GraniteForCausalLM):
    """`transformers.GraniteForCausalLM` whose `config.octavo` says what is quantized."""

    octavo_decoder = Decoder(
        layers="layers",
        embedding="embed_tokens",
        norm="norm",
        rotary="rotary_emb",
        head="lm_head",
        attention=AttentionFacts(
            name="self_attn",
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            output="self_attn.o_proj",
        ),
        mlp=MlpFacts(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        states_scale=_states_scale,
        logits_divisor=_logits_divisor,
        residual_scale=_residual_scale,
    )
