"""Codecs and schemes in a few words, and what is known of when to choose which."""

import torch
from transformers import PreTrainedConfig

from .common.runtime.schemes.kv_scheme import Scheme
from .common.runtime.schemes.tensor_codec import Codec
from .counting import counted_bits

LAYERS, KV_HEADS, HEAD_DIM, TOKENS = 32, 8, 128, 2048
"""The shape by which bits are told where there is no model."""
WHEN = {
    "float": "to compare with: K and V as they are",
    "int8-token": "the usual one: as good as float, fast",
    "octavo-8": "the best of 8 bits",
    "octavo-4": "half the bytes of 8, no calibration",
    "octavo-4c": "octavo-4, calibrated: loses less",
    "octavo-4t": "of single tokens, as engines page",
    "octavo-4tc": "octavo-4t, calibrated: loses less",
    "octavo-3": "under 4 bits; recalls worse from afar",
    "octavo-3c": "octavo-3, calibrated: loses less",
    "octavo-3t": "of single tokens, as engines page",
    "octavo-3tc": "octavo-3t, calibrated: loses less",
    "octavo-2": "fewest bytes; recalls and copies worse",
    "octavo-2c": "octavo-2, calibrated: loses less",
    "octavo-2t": "the same of single tokens; loses much",
    "octavo-2tc": "octavo-2t, calibrated: loses less",
    "ascend-c8": "MindIE, vllm-ascend, ONNX Runtime",
    "ascend-fa": "MindIE, attention in int8 (FAQuant)",
    "ort-int8-channel": "ONNX Runtime, int8_per_channel",
    "vllm-fp8": "vLLM and others, fp8 cache by one scale",
    "vllm-fp8-head": "vLLM, a scale per head: loses less",
    "fp8-token": "vLLM's fp8_per_token_head; int8 beats it",
    "fp8_e5m2": "vLLM's fp8_e5m2; e4m3 loses less",
    "mxfp8": "OCP and SGLang; int8 loses less",
    "openvino-u8": "OpenVINO on CPUs, u8, its default",
    "llamacpp-q8_0": "llama.cpp (GGUF), as good as float",
    "llamacpp-q4_0": "llama.cpp (GGUF) in 4 bits; loses much",
    "llamacpp-q4_1": "the same, with a lowest value per block",
    "lmdeploy-int8": "LMDeploy, quant_policy=8",
    "lmdeploy-int8-ptq": "LMDeploy before 0.4",
    "lmdeploy-int4": "LMDeploy, quant_policy=4; loses much",
    "int4-token": "simple 4 bits; octavo-4 loses far less",
    "openvino-u4": "OpenVINO on CPUs, u4; loses much",
    "nvfp4": "vLLM, SGLang, TensorRT-LLM; loses much",
    "mxfp4": "OCP MXFP4; loses much",
    "k8v4": "8 bits where it counts more, 4 for V",
    "k4v2": "4 bits for K, 2 for V; loses much",
    "oscar-2": "OSCAR; octavo-2c takes fewer bits",
    "saw-int4": "octavo-4t keeps sinks, loses far less",
    "turboquant-k8v4": "vLLM's turboquant_k8v4",
    "turboquant-4": "vLLM's turboquant_4bit_nc",
    "turboquant-k3v4": "vLLM's turboquant_k3v4_nc",
    "turboquant-3": "vLLM's turboquant_3bit_nc",
    "turboquant-lmdeploy": "LMDeploy's policy 42; loses much",
    "turboquant-mse-4": "the paper's; octavo-4t loses far less",
    "turboquant-mse-3": "the paper's; octavo-3t loses far less",
    "turboquant-mse-2": "the paper's; octavo-2t loses far less",
    "kivi-4": "to compare with; octavo-4 has fewer bits",
    "kivi-2": "to compare with; octavo-2 loses less",
    "kitty-2": "to compare with; more bits than octavo-2",
    "kvarn-4": "KVarN, K and V in 4 bits, in tiles",
    "kvarn-k4v2": "KVarN's kvarn_k4v2_g128",
    "kvarn-2": "KVarN, K and V in 2 bits, in tiles",
    "kvquant-4": "to compare with; slow, outliers apart",
    "kvquant-3": "to compare with; slow, outliers apart",
    "kvquant-2": "to compare with; slow, outliers apart",
}
"""By the name of a preset, in the order in which they are listed within as many bits."""
COMPARED = tuple(
    name for name in WHEN if name.startswith(("kitty-", "kivi-", "kvarn-", "kvquant-", "oscar-", "saw-", "turboquant-"))
)
"""Presets of methods that nobody needs to choose: they are here to be compared with."""


def codec_words(codec: Codec | None) -> str:
    """A codec in a few words, as "int4 per channel x 64, affine"."""
    if codec is None:
        return "float"
    group = f" x {codec.group_size}" if codec.group_size else ""
    kind = "" if codec.symmetric else ", affine"
    levels = "" if codec.levels == "uniform" else f", {codec.levels} levels"
    wide = f", {codec.wide_share:.1%} {codec.wide_dtype}" if codec.wide_share else ""
    second = ", second scales" if codec.tile else ""
    return f"{codec.dtype} per {codec.granularity}{group}{kind}{levels}{wide}{second}"


def codec_short(codec: Codec | None) -> str:
    """The same for a narrow column, as "int4 channel/64"."""
    if codec is None:
        return "float"
    group = f"/{codec.group_size}" if codec.group_size else ""
    return f"{codec.dtype.removeprefix('fp8_')} {codec.granularity}{group}"


def usual_bits(scheme: Scheme) -> float:
    """Bits of an element of K and V, as `counted_bits`, of a model and a length that are usual."""
    config = PreTrainedConfig(
        num_hidden_layers=max(LAYERS, scheme.layers_named),
        num_attention_heads=KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    return counted_bits(config, scheme, TOKENS, torch.float16)
