"""Phi-3 and Phi-4 with a quantized KV cache, quantized attention and quantized linears.

    hidden [B, S, hidden]
      -> qkv_proj                     one linear on codes, in the kind that the checkpoint says; rows of q, of k, of v
      -> RoPE on q [B, H, S, D] and k [B, G, S, D], of which it turns the first channels, all in Phi-3
      -> cache.update(k, v)           encodes the new tokens once; returns the codes of all
      -> attention(q, codes)          reads the newest `sliding_window` of the codes, or all if there is no window
      -> o_proj

"fa3" is Ascend's word for 8-bit per-head attention quantization (FAQuant), not FlashAttention-3. With LongRoPE, angles
change where a sequence grows beyond `original_max_position_embeddings`: `generate` computes all keys anew there.
"""

import transformers

from ...common.runtime.decoder import AttentionFacts, Decoder, MlpFacts
from ...common.runtime.model import QuantizedCausalLM


class Phi3ForCausalLM(QuantizedCausalLM, transformers.Phi3ForCausalLM):
    """`transformers.Phi3ForCausalLM` whose `config.octavo` says what is quantized."""

    octavo_decoder = Decoder(
        layers="layers",
        embedding="embed_tokens",
        norm="norm",
        rotary="rotary_emb",
        head="lm_head",
        attention=AttentionFacts(
            name="self_attn",
            query="self_attn.qkv_proj",
            key="self_attn.qkv_proj",
            value="self_attn.qkv_proj",
            output="self_attn.o_proj",
        ),
        mlp=MlpFacts(gate="mlp.gate_up_proj", up="mlp.gate_up_proj", down="mlp.down_proj"),
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        is_partly_rotated=True,
    )
