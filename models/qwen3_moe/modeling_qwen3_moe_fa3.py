"""Qwen3 with experts, a quantized KV cache, quantized attention and quantized linears.

    hidden [B, S, hidden]
      -> q_proj, k_proj, v_proj       on codes, in the kind that the checkpoint says
      -> RMSNorm of each head of q and k, then RoPE: q [B, H, S, D], k [B, G, S, D]
      -> cache.update(k, v)           encodes the new tokens once; returns the codes of all
      -> attention(q, codes)          reads the codes
      -> o_proj
      -> router, in float             chooses experts for each token
      -> gate_proj, up_proj, down_proj of each of them, on codes; or of the plain MLP that some layers have

"fa3" is Ascend's word for 8-bit per-head attention quantization (FAQuant), not FlashAttention-3.
"""

from typing import Any

import transformers

from ...common.runtime.decoder import AttentionFacts, Decoder, MlpFacts
from ...common.runtime.experts import ExpertsFacts
from ...common.runtime.model import QuantizedCausalLM


def experts_of_layer(config: Any, index: int) -> int:
    """How many experts a layer has: none where the config gives it the plain MLP."""
    is_sparse = index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0
    return config.num_experts if is_sparse else 0


class Qwen3MoeForCausalLM(QuantizedCausalLM, transformers.Qwen3MoeForCausalLM):
    """`transformers.Qwen3MoeForCausalLM` whose `config.octavo` says what is quantized."""

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
        experts=ExpertsFacts(
            name="mlp.experts",
            router="mlp.gate",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
            merged_inputs="gate_up_proj",
            merged_output="down_proj",
            activation="act_fn",
            count=experts_of_layer,
        ),
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
    )
