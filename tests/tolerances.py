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
}
