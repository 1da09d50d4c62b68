"""Runs in OpenVINO's environment: what its CPU plugin keeps of k and v in a stateful attention, and answers."""

import json
import sys

import numpy as np
import openvino as ov
from openvino import PartialShape, Type
from openvino import opset13 as ops
from openvino.op.util import Variable, VariableInfo

OPTIONS = ("KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION", "KEY_CACHE_GROUP_SIZE", "VALUE_CACHE_GROUP_SIZE")


def attention(heads: int, width: int) -> ov.Model:
    """Attention of q, k, v `[1, G, S, D]` to all tokens that came, as OpenVINO's graphs of language models have it."""
    shape = PartialShape([1, heads, -1, width])
    query, key, value = (ops.parameter(shape, Type.f32, name=name) for name in ("query", "key", "value"))
    beams = ops.parameter(PartialShape([-1]), Type.i32, name="beams")
    stored, sinks = [], []
    for name, new in (("key", key), ("value", value)):
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = shape, Type.f32, name
        variable = Variable(info)
        past = ops.read_value(ops.constant(np.zeros((1, heads, 0, width), np.float32)), variable)
        chosen = ops.gather(past, beams, ops.constant(0, dtype=np.int32))
        stored.append(ops.concat([chosen, new], 2))
        sinks.append(ops.assign(stored[-1], variable))
    output = ops.scaled_dot_product_attention(query, *stored, causal=False)
    return ov.Model([ops.result(output)], sinks, [query, key, value, beams], "attention")


def main(file: str, into: str, precision: str) -> None:
    """Of `query`, `key` and `value` of a file of numpy's: the last output, and k and v as they are kept, into another.

    The last token comes alone, since the tokens of a first pass are attended to as they are.
    """
    given = np.load(file)
    model = attention(given["key"].shape[1], given["key"].shape[3])
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    if precision != "default":
        settings |= {"KEY_CACHE_PRECISION": precision, "VALUE_CACHE_PRECISION": precision}
    compiled = ov.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    for tokens in (slice(None, -1), slice(-1, None)):
        new = {name: part[:, :, tokens] for name, part in given.items()}
        output = request.infer({**new, "beams": np.zeros(1, np.int32)})[0]
    kept = {state.name: np.array(state.state.data) for state in request.query_state()}
    np.savez(into, output=output, **kept)
    print("\n" + json.dumps({name: str(compiled.get_property(name)) for name in OPTIONS}))


if __name__ == "__main__":
    main(*sys.argv[1:])
