"""How far results may be from their references: the one table of tolerances.

`rmse` is the root mean square of the difference relative to that of the reference; `codes` the share of codes that may
differ, by 1.
"""

TOLERANCES = {
    "codes": 1e-3,
    # Calls of torch_npu against models of its documents (tests/ops/npu_models.py), of which the rounding of results and
    # scales to float16 or bfloat16 is the error.
    "npu rmse float16": 1e-3,
    "npu rmse bfloat16": 8e-3,
    # The ATB op quantizes the weights of attention to 8 bits, which the reference does not: 0.012 to 0.021 measured
    # with random codes, where V averages out.
    "npu int8 attention rmse": 3e-2,
    # Logits of a tiny model in float16: differences of single codes, where rounding of k and v differs.
    "npu rmse of a model": 1e-2,
    # Outputs of attention over the same codes, and logits of a tiny float32 model, however a prompt is cut or padded.
    "attention": 1e-5,
    # More than 192 rows (queries times heads of a KV head) over int8 and int4 codes, of which digits of 16 bits are
    # multiplied and not of 24: 1.0e-4 measured with random codes; 1.2e-4 on average over the layers of SmolLM2 at
    # 2,048 tokens, where rounding V to int8 costs 3e-3 to 7e-3.
    "attention of many rows": 2e-4,
    "log-sum-exp of many rows": 5e-4,
    # Scores of a thousand, of which float32 keeps some 1e-4: that is the error of the weights.
    "attention with large scores by position": 1e-3,
    "log-sum-exp of large scores by position": 5e-4,
    # Outputs of linears that sum in float32 in another order, and where outputs are rounded to 16 bits after that.
    "linear": 2e-6,
    # States behind decoder layers whose inputs are quantized: single codes tip over where sums are in another order.
    "decoder layer": 5e-3,
    "linear in half": 2e-3,
    "logits": 1e-4,
    # A token at a time: rounding of the linears tips some codes over (see test_quantized_cache.py).
    "codes tipped over": 5e-3,
    "logits rmse with codes tipped over": 1e-3,
    # Each rank rounds its part of a sum to bfloat16, and that tips codes over, too. Measured: 2.4e-2.
    "ranks rmse bfloat16": 5e-2,
    # Prompts of hundreds of tokens, whole and in chunks: 2.5e-3 measured, where quantization itself makes 1e-2.
    "logits rmse of many rows": 6e-3,
    # Of the largest value: zeros of codes rounded to float16. Measured: 9.3e-4 but for codes that tip over.
    "float16 zeros": 2e-3,
    # Directories of msmodelslim against a simulation in float64; quantization itself is 0.22 away from the float model.
    # bf16: the format rounds deq_scale to it. "computed in": activations in half precision tip many codes over.
    "simulation rmse float32": 5e-3,
    "simulation rmse float16": 2e-2,
    "simulation rmse bfloat16": 1e-1,
    "simulation rmse computed in half": 1.5e-1,
    # Any architecture in float64 against a simulation that quantizes the same: single codes of linears that tip over,
    # 0.014 measured where any do, else 1e-5; quantization itself is 0.04 to 0.6 away from the float model.
    "simulation rmse float64": 2e-2,
    # Logits of random models of a few layers, calibrated on eight short texts: 0.05 to 0.07 and 0.06 to 0.10 measured.
    "rmse of a tiny model, C8": 0.15,
    "rmse of a tiny model, W8A8": 0.3,
    # KL(float || quantized), nats per token, of random models of three layers of every architecture: up to 1.0e-3,
    # 2.3e-2 and 1.2e-2 measured, of Gemma 3 and of experts; a third of that of the others.
    "kl of a tiny model, int8-token": 2e-3,
    "kl of a tiny model, octavo-4": 4e-2,
    "kl of a tiny model, W8A8 dynamic": 1.5e-2,
    # KL(in float32 || in 16 bits), nats per token, of random models with caches of 2 to 8 bits: 0.10 measured, and
    # 0.15 where K and V of all tokens are in 2 bits.
    "kl of a tiny model in 16 bits": 0.2,
    # KL(float || quantized), nats per token, SmolLM2-135M on a window of 2,048 tokens of Wikipedia.
    "kl int8-token": 8e-4,
    "kl ascend-c8": 2e-3,
    "kl ascend-fa": 5e-3,
    # Triton kernels against references in float32: the rounding of results to their dtype, and in attention that of the
    # weights to it. float32: sums in another order, and products of three TF32 ones. Measured up to 1.9e-3 (bfloat16),
    # 4.6e-4 (float16) and 5.5e-7.
    "cuda linear float32": 2e-6,
    "cuda linear float16": 4e-4,
    "cuda linear bfloat16": 3e-3,
    "cuda attention float32": 2e-6,
    "cuda attention float16": 1e-3,
    "cuda attention bfloat16": 4e-3,
}
