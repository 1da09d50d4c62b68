"""How messages call what the user gave: by the flags of the scripts, or by the fields of a `ConvertRequest`.

The code writes the field; the scripts, which most messages are for, turn it into the flag.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

FLAG_OF = {
    "model": "--model_path",
    "output": "--save_directory",
    "give architecture='{}'": "run models/{}/convert_quant_weights.py",
    "scheme": "--scheme",
    "linear": "--quantization",
    "linear=None": "--w_bit 16 --a_bit 16",
    "label": "--quantization",
    "group_size": "--group_size",
    "group_size=0": "--group_size 0",
    "symmetric": "--w_sym",
    "w_method": "--w_method",
    "act_method": "--act_method",
    "cpu_activations": "--cpu_activations",
    "anti_method": "--anti_method",
    "kv_scales": "--kv_scales",
    "float_linears": "--disable_names",
    "float_head": "--disable_last_linear",
    "float_head=False": "--disable_last_linear False",
    "embeddings": "--embeddings",
    "float_outliers": "--disable_level",
    "float_costliest": "--fa_amp",
    "mean_bits": "--w_bits_mean",
    "max_kl": "--max_kl",
    "calibration": "--calib_file",
    "no calibration": "no --calib_file and no --calib_texts",
    "target": "--target",
    "pdmix": "--pdmix",
    "device": "--device_type",
    "tokenizer_arguments": "--tokenizer_args",
    "input_ids_name": "--input_ids_name",
    "attention_mask_name": "--attention_mask_name",
    "trust_remote_code": "--trust_remote_code",
    "max_shard_gb": "--part_file_size",
    "save_statistics": "--save_statistics",
    "requantize": "--requantize",
    "a linear": "--quantization, --w_bit, --preset or another flag of linears",
    "resume": "--resume",
    "format": "--format",
    "resume=True": "--resume",
    "files of model": "files of --model_path",
}
"""By what the code writes."""

_NAMES_FIELDS = ContextVar("names_fields", default=False)


def named(field: str) -> str:
    """A field as the user knows it: as it is within `naming_fields`, and else the flag."""
    return field if _NAMES_FIELDS.get() else FLAG_OF[field]


def named_without_dashes(field: str) -> str:
    """The same for a list of names, which has other names than those of fields, too."""
    return named(field).removeprefix("--") if field in FLAG_OF else field


@contextmanager
def naming_fields() -> Iterator[None]:
    """Within it, messages name the fields of a request."""
    token = _NAMES_FIELDS.set(True)
    try:
        yield
    finally:
        _NAMES_FIELDS.reset(token)


def codes_stay(asked: str, which: str) -> str:
    """A refusal of what is asked of linears whose codes are passed on.

    Args:
        asked: the field or flag.
        which: of which model, and that they are in codes.
    """
    return (
        f"{asked}: the linears of {which}, which stay as they are; leave it out, or decode and quantize them again by "
        f"{named('requantize')}"
    )
