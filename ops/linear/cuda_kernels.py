"""Triton kernels of linear layers.

Activations that are quantized become codes in one kernel, and a second multiplies codes by codes; weight-only layers
take one kernel, which decodes tiles of weights in registers. No weight is ever in memory as float.
"""

from ..shared.triton_helpers import codes_as_float, codes_as_half, e4m3_as_half, jit, tl, to_code


@jit()
def quantize_rows_kernel(
    x, codes, row_scale, input_scale, input_offset, in_features,
    LOW: tl.constexpr, HIGH: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A row of x as codes: by `input_scale` a part of it, or all of it by the scale that it finds and writes.

    By `input_scale` and with `row_scale` it writes a scale of 1, or of NaN where the row has one.
    """
    pointer, row_stride, column_stride = x
    row = tl.program_id(0).to(tl.int64)
    pointer += row * row_stride
    codes += row * in_features
    offsets = tl.arange(0, BLOCK)
    nans = tl.zeros([BLOCK], tl.int32)
    if input_scale is not None:
        for start in range(tl.program_id(1) * BLOCK, in_features, tl.num_programs(1) * BLOCK):
            inside = start + offsets < in_features
            values = tl.load(pointer + (start + offsets) * column_stride, mask=inside, other=0).to(tl.float32)
            values = tl.div_rn(values, tl.zeros_like(values) + tl.load(input_scale).to(tl.float32))
            if input_offset is not None:
                values += tl.load(input_offset).to(tl.float32)
            tl.store(codes + start + offsets, to_code(values, KIND), mask=inside)
            nans += (inside & (values != values)).to(tl.int32)
        if row_scale is not None:
            tl.store(row_scale + row, tl.where(tl.max(nans, 0) > 0, float("nan"), 1.0))
    else:
        largest = tl.zeros([BLOCK], tl.float32)
        for start in range(0, in_features, BLOCK):
            inside = start + offsets < in_features
            values = tl.load(pointer + (start + offsets) * column_stride, mask=inside, other=0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(values))
            nans += (values != values).to(tl.int32)
        step = tl.div_rn(tl.max(largest, 0), tl.full([], HIGH, tl.float32))
        step = tl.where(tl.max(nans, 0) > 0, float("nan"), tl.maximum(step, SMALLEST))
        tl.store(row_scale + row, step)
        for start in range(0, in_features, BLOCK):
            inside = start + offsets < in_features
            values = tl.load(pointer + (start + offsets) * column_stride, mask=inside, other=0).to(tl.float32)
            values = tl.div_rn(values, tl.zeros_like(values) + step)
            tl.store(codes + start + offsets, to_code(values, KIND), mask=inside)


@jit()
def token_linear_kernel(
    x, weight, output, input_scale, input_offset, column_scale, quant_bias, bias, out_features, in_features,
    HIGH: tl.constexpr, SMALLEST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of x times codes `[N, K]`: what `quantize_rows_kernel` and `codes_linear_kernel` give, in int8.

    Every program quantizes all of the row, which costs less than to hand it over, and the products are too few for the
    matrix units. Weights are fetched a tile ahead.
    """
    x_pointer, _, x_column = x
    weight_pointer, weight_row, weight_column = weight
    first = tl.program_id(0) * BLOCK_N
    column, k = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    is_column = column < out_features
    weight_pointer += first.to(tl.int64) * weight_row
    places = tl.arange(0, BLOCK_N)[:, None] * weight_row + (k * weight_column)[None, :]
    following = tl.load(weight_pointer + places, mask=is_column[:, None] & (k < in_features)[None, :], other=0)
    nans = tl.zeros([BLOCK_K], tl.int32)
    if input_scale is None:
        largest = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, in_features, BLOCK_K):
            values = tl.load(x_pointer + (start + k) * x_column, mask=start + k < in_features, other=0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(values))
            nans += (values != values).to(tl.int32)
        step = tl.maximum(tl.div_rn(tl.max(largest, 0), tl.full([], HIGH, tl.float32)), SMALLEST)
    else:
        step = tl.load(input_scale).to(tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    for start in range(0, in_features, BLOCK_K):
        codes = following
        weight_pointer += BLOCK_K * weight_column
        ahead = start + BLOCK_K + k < in_features
        following = tl.load(weight_pointer + places, mask=is_column[:, None] & ahead[None, :], other=0)
        values = tl.load(x_pointer + (start + k) * x_column, mask=start + k < in_features, other=0).to(tl.float32)
        values = tl.div_rn(values, tl.zeros_like(values) + step)
        if input_offset is not None:
            values += tl.load(input_offset).to(tl.float32)
        if input_scale is not None:
            nans += ((start + k < in_features) & (values != values)).to(tl.int32)
        total += codes.to(tl.int32) * to_code(values, "int8").to(tl.int32)[None, :]
    result = tl.sum(total, 1)
    if quant_bias is not None:
        result += tl.load(quant_bias + column, mask=is_column, other=0)
    scale = tl.load(column_scale + column, mask=is_column, other=0)
    if input_scale is None:
        scale *= step
    scale = tl.where(tl.max(nans, 0) > 0, float("nan"), scale)
    result = result.to(tl.float32) * scale
    if bias is not None:
        result += tl.load(bias + column, mask=is_column, other=0).to(tl.float32)
    tl.store(output + column, result.to(output.dtype.element_ty), mask=is_column)


@jit()
def _output_tile(rows, out_features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first row and column of a program's tile; tiles that share weights run beside each other."""
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    band = tl.program_id(0) // (8 * column_blocks)
    in_band = tl.minimum(row_blocks - band * 8, 8)
    place = tl.program_id(0) % (8 * column_blocks)
    return (band * 8 + place % in_band) * BLOCK_M, (place // in_band) * BLOCK_N


@jit()
def _store_tile(output, values, bias, row, column, rows, out_features):
    """Write a tile of `[M, N]` with the bias added."""
    if bias is not None:
        values += tl.load(bias + column, mask=column < out_features, other=0).to(tl.float32)[None, :]
    places = row.to(tl.int64)[:, None] * out_features + column[None, :]
    inside = (row < rows)[:, None] & (column < out_features)[None, :]
    tl.store(output + places, values.to(output.dtype.element_ty), mask=inside)


@jit("rows")
def codes_linear_kernel(
    codes, weight, output, row_scale, column_scale, quant_bias, bias, rows, out_features, in_features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_EVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of codes `[M, K]` times codes `[N, K]`; `DOT` is "int8", "fp8", or "fp16" for fp8 where units lack it.

    `row_scale` is `(pointer, stride)` or None, `column_scale` `(pointer, stride)`, `quant_bias` int32 `[N]` or None.
    """
    first_row, first_column = _output_tile(rows, out_features, BLOCK_M, BLOCK_N)
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    weight_pointer, weight_row, weight_column = weight
    k = tl.arange(0, BLOCK_K)
    codes += first_row.to(tl.int64) * in_features
    weight_pointer += first_column.to(tl.int64) * weight_row
    a_places = tl.arange(0, BLOCK_M)[:, None] * in_features + k[None, :]
    b_places = tl.arange(0, BLOCK_N)[:, None] * weight_row + (k * weight_column)[None, :]
    is_row, is_column = (row < rows)[:, None], (column < out_features)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if DOT == "int8" else tl.float32)
    for start in range(0, in_features, BLOCK_K):
        if IS_EVEN:
            a = tl.load(codes + a_places, mask=is_row, other=0)
            b = tl.load(weight_pointer + b_places, mask=is_column, other=0)
        else:
            a = tl.load(codes + a_places, mask=is_row & (start + k < in_features)[None, :], other=0)
            b = tl.load(weight_pointer + b_places, mask=is_column & (start + k < in_features)[None, :], other=0)
        codes += BLOCK_K
        weight_pointer += BLOCK_K * weight_column
        if DOT == "int8":
            total = tl.dot(a, tl.trans(b), acc=total, out_dtype=tl.int32)
        elif DOT == "fp8":  # the units add up few bits: the sum over blocks is taken outside of them
            a, b = a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True)
            total += tl.dot(a, tl.trans(b))
        else:
            total = tl.dot(e4m3_as_half(a, False), tl.trans(e4m3_as_half(b, False)), acc=total)
    if quant_bias is not None:
        total += tl.load(quant_bias + column, mask=column < out_features, other=0)[None, :]
    scale_pointer, scale_stride = column_scale
    scale = tl.load(scale_pointer + column * scale_stride, mask=column < out_features, other=0)[None, :]
    if row_scale is not None:
        row_pointer, row_stride = row_scale
        scale = tl.load(row_pointer + row * row_stride, mask=row < rows, other=0)[:, None] * scale
    _store_tile(output, total.to(tl.float32) * scale, bias, row, column, rows, out_features)


@jit()
def _weight_product(x, weight, total, KIND: tl.constexpr, DOT: tl.constexpr):
    """`total + x @ weight.T` where weights are codes, exact in every type of x; of int4, `code + 8` in uint8."""
    if DOT == "fp32":
        values = codes_as_float(weight, KIND, False)
        total = tl.dot(x.to(tl.float32), tl.trans(values), acc=total, input_precision="tf32x3")
    else:
        if x.dtype == tl.float16:
            values = codes_as_half(weight, KIND, False)
        elif KIND == "int4":  # as bits of 128 + code + 8
            values = (weight.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True).to(tl.float32) - 136.0
            values = values.to(tl.bfloat16)
        else:
            values = weight.to(tl.bfloat16)
        total = tl.dot(x, tl.trans(values), acc=total)
    return total


@jit("rows")
def weight_only_kernel(
    x, weight, scale, zero, output, bias, rows, out_features, in_features, group_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_EVEN: tl.constexpr, IS_INT4: tl.constexpr,
    IS_GROUPED: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of float `[M, K]` times codes `[N, K]`, whose scale and zero are applied to the sums of a block.

    Of int4, bytes hold codes that are half of `PACKED` apart, and x is taken in two parts to match.
    """
    first_row, first_column = _output_tile(rows, out_features, BLOCK_M, BLOCK_N)
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    x_pointer, x_row, x_column = x
    weight_pointer, weight_row, weight_column = weight
    scale_pointer, scale_row, scale_column = scale
    BYTES: tl.constexpr = BLOCK_K // 2 if IS_INT4 else BLOCK_K
    byte = tl.arange(0, BYTES)
    k = byte // (PACKED // 2) * PACKED + byte % (PACKED // 2) if IS_INT4 else byte
    is_row, is_column = (row < rows)[:, None], (column < out_features)[:, None]
    x_pointer += first_row.to(tl.int64) * x_row
    weight_pointer += first_column.to(tl.int64) * weight_row
    x_places = tl.arange(0, BLOCK_M)[:, None] * x_row + (k * x_column)[None, :]
    places = tl.arange(0, BLOCK_N)[:, None] * weight_row + (byte * weight_column)[None, :]
    scale_places = scale_pointer + column.to(tl.int64) * scale_row
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, in_features, BLOCK_K):
        inside = is_row if IS_EVEN else is_row & (start + k < in_features)[None, :]
        is_weight = is_column if IS_EVEN else is_column & (start + k < in_features)[None, :]
        codes = tl.load(weight_pointer + places, mask=is_weight, other=0)
        values = tl.load(x_pointer + x_places, mask=inside, other=0)
        block = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) if IS_GROUPED else total
        block_sum = tl.zeros([BLOCK_M], tl.float32) if IS_GROUPED else x_sum
        if zero is not None:
            block_sum += tl.sum(values.to(tl.float32), 1)
        if IS_INT4:
            second = start + k + PACKED // 2
            inside = is_row if IS_EVEN else is_row & (second < in_features)[None, :]
            others = tl.load(x_pointer + PACKED // 2 * x_column + x_places, mask=inside, other=0)
            if zero is not None:
                block_sum += tl.sum(others.to(tl.float32), 1)
            block = _weight_product(values, codes & 15, block, "int4", DOT)
            block = _weight_product(others, codes >> 4, block, "int4", DOT)
        else:
            block = _weight_product(values, codes, block, "int8", DOT)
        x_pointer += BLOCK_K * x_column
        weight_pointer += BYTES * weight_column
        if IS_GROUPED:
            index = tl.cast(start // group_size, tl.int64)
            if zero is not None:
                zero_pointer, zero_row, zero_column = zero
                zero_places = zero_pointer + column.to(tl.int64) * zero_row + index * zero_column
                block -= block_sum[:, None] * tl.load(zero_places, mask=column < out_features, other=0).to(tl.float32)
            steps = tl.load(scale_places + index * scale_column, mask=column < out_features, other=0).to(tl.float32)
            total += block * steps[None, :]
        else:
            total = block
            x_sum = block_sum
    if not IS_GROUPED:
        if zero is not None:
            zero_pointer, zero_row, zero_column = zero
            zeros = tl.load(zero_pointer + column.to(tl.int64) * zero_row, mask=column < out_features, other=0)
            total -= x_sum[:, None] * zeros.to(tl.float32)[None, :]
        total *= tl.load(scale_places, mask=column < out_features, other=0).to(tl.float32)[None, :]
    _store_tile(output, total, bias, row, column, rows, out_features)
