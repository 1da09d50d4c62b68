"""SmolLM3 with a quantized KV cache, quantized attention and quantized linears.

    hidden [B, S, hidden]
      -> q_proj, k_proj, v_proj       on codes, in the kind that the checkpoint says
      -> RoPE on q [B, H, S, D] and k [B, G, S, D], but where the config's
                                      `no_rope_layers` has a 0, which is every fourth layer
      -> cache.update(k, v)           encodes the new tokens once; returns the codes of all
      -> attention(q, codes)          reads the codes; in sliding layers the newest `sliding_window` of them
      -> o_proj

"fa3" is Ascend's word for 8-bit per-head attention quantization (FAQuant), not FlashAttention-3.
"""

import transformers

from ...common.runtime.decoder import AttentionFacts, Decoder, MlpFacts
from ...common.runtime.model import QuantizedCausalLM


class SmolLM3ForCausalLM(QuantizedCausalLM, transformers.SmolLM3ForCausalLM):
    """`transformers.SmolLM3ForCausalLM` whose `config.octavo` says what is quantized."""

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
        skips_rotation=True,
    )
