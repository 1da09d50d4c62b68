"""Qwen2 and Qwen2.5 with a quantized KV cache, quantized attention and W8A8 linears.

    hidden [B, S, hidden]
      -> q_proj, k_proj, v_proj       with biases; int8 x int8 where the checkpoint says W8A8
      -> RoPE on q [B, H, S, D] and k [B, G, S, D]
      -> cache.update(k, v)           encodes the new tokens once; returns the codes of all
      -> attention(q, codes)          reads the codes; in sliding layers the newest `sliding_window` of them
      -> o_proj

"fa3" is Ascend's word for 8-bit per-head attention quantization (FAQuant), not FlashAttention-3. K biases reach 200 on
single channels: a scale per channel (C8) holds them, one per token or head loses what lies beside them.
"""

import transformers

from ...common.model import QuantizedCausalLM


class Qwen2ForCausalLM(QuantizedCausalLM, transformers.Qwen2ForCausalLM):
    """`transformers.Qwen2ForCausalLM` whose `config.octavo` says what is quantized."""
