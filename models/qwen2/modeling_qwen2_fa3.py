"""Qwen2 and Qwen2.5 with a quantized KV cache, quantized attention and quantized linears.

    hidden [B, S, hidden]
      -> q_proj, k_proj, v_proj       on codes, in the kind that the checkpoint says; biases of k and v stay out
      -> RoPE on q [B, H, S, D] and k [B, G, S, D]
      -> cache.update(k, v)           encodes the new tokens once; returns the codes of all
      -> attention(q, codes)          reads the codes, in sliding layers the newest `sliding_window` of them; adds the
                                      rotated biases of k to the scores and those of v to the output, exactly
      -> o_proj

"fa3" is Ascend's word for 8-bit per-head attention quantization (FAQuant), not FlashAttention-3. K biases reach 200 on
single channels: one scale per token or head would lose what lies beside them, so `bias_fold.py` keeps them out of the
cache. Ascend's own schemes count them in: a scale per channel (C8) holds them, one per head does not.
"""

import transformers

from ...common.runtime.decoder import AttentionFacts, Decoder, MlpFacts
from ...common.runtime.model import QuantizedCausalLM


class Qwen2ForCausalLM(QuantizedCausalLM, transformers.Qwen2ForCausalLM):
    """`transformers.Qwen2ForCausalLM` whose `config.octavo` says what is quantized."""

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
