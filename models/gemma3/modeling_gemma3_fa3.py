"""Gemma 3 (text) with a quantized KV cache, quantized attention and quantized linears.

    hidden [B, S, hidden]             embeddings times sqrt(hidden), which transformers rounds to their dtype
      -> norm by 1 + w
      -> q_proj, k_proj, v_proj       on codes, in the kind that the checkpoint says
      -> RMSNorm of each head of q and k, then RoPE of the kind of layer: q [B, H, S, D], k [B, G, S, D]
      -> cache.update(k, v)           encodes the new tokens once; returns the codes of all
      -> attention(q, codes)          reads the codes; in sliding layers the newest `sliding_window` of them
      -> o_proj, then a norm of what attention adds; likewise about the MLP

"fa3" is Ascend's word for 8-bit per-head attention quantization (FAQuant), not FlashAttention-3.
"""

from typing import Any

import transformers

from ...common.runtime.decoder import AttentionFacts, Decoder, MlpFacts
from ...common.runtime.model import QuantizedCausalLM


def _embedding_scale(config: Any) -> float:
    return config.hidden_size**0.5


class Gemma3ForCausalLM(QuantizedCausalLM, transformers.Gemma3ForCausalLM):
    """`transformers.Gemma3ForCausalLM` whose `config.octavo` says what is quantized."""

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
            query_norm="self_attn.q_norm",
            key_norm="self_attn.k_norm",
        ),
        mlp=MlpFacts(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
        attention_norm="input_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
        embedding_scale=_embedding_scale,
        caps_logits=True,
        activation="hidden_activation",
    )
