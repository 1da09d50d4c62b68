"""Llama with a quantized KV cache, quantized attention and quantized linears.

    hidden [B, S, hidden]
      -> q_proj, k_proj, v_proj       on codes, in the kind that the checkpoint says
      -> RoPE on q [B, H, S, D] and k [B, G, S, D]
      -> cache.update(k, v)           encodes the new tokens once; returns the codes of all
      -> attention(q, codes)          reads the codes; nothing decodes the cache
      -> o_proj

"fa3" is Ascend's word for 8-bit per-head attention quantization (FAQuant), not FlashAttention-3. Llama has no biases in
its attention and nothing else that quantization must know of, so this file only puts the two classes together.
"""

import transformers

from ...common.runtime.decoder import AttentionFacts, Decoder, MlpFacts
from ...common.runtime.model import QuantizedCausalLM


class LlamaForCausalLM(QuantizedCausalLM, transformers.LlamaForCausalLM):
    """`transformers.LlamaForCausalLM` whose `config.octavo` says what is quantized."""

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
    )
