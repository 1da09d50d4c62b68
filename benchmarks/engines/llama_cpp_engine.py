"""The worker of llama.cpp, through the C functions that llama-cpp-python binds."""

import ctypes
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as lib
import numpy as np
from safetensors import safe_open
from worker import chunks, serve, steps

FILE_TYPES = {"q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_k_m": lib.LLAMA_FTYPE_MOSTLY_Q4_K_M}
CACHE_TYPES = {"f16": 1, "q8_0": 8}
"""Of ggml."""
TOKENS_AT_ONCE = 2048
KEEP_FROM = 30.0
"""Seconds of a prompt from which on the state behind it is kept in a file."""
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of a checkpoint."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{TENSORS[stem]}.{kind}"
    layer, _, module = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{TENSORS[module]}.{kind}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Channels that RoPE pairs beside each other, as GGUF's llama wants them, in place of half a head apart."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _write_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config.get("head_dim") or width // heads)
    writer.add_value_length(config.get("head_dim") or width // heads)
    writer.add_rope_dimension_count(config.get("head_dim") or width // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def write_gguf(source: Path, target: Path) -> None:
    """A checkpoint of Llama or Qwen2 in its own dtype, vectors in float32, without a tokenizer."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, config["model_type"])
    _write_config(writer, config)
    turned = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                heads = turned.get(name.split(".")[-2])
                if heads and config["model_type"] == "llama":
                    tensor = interleaved(tensor, heads)
                writer.add_tensor(gguf_name(name), tensor if tensor.ndim > 1 else tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCppEngine:
    """A GGUF file, flash attention, and a cache of some type of ggml."""

    def prepare(self, source: str, into: str, weights: str) -> None:
        """Write a GGUF file and quantize it.

        Raises:
            RuntimeError: llama.cpp could not.
        """
        folder = Path(into)
        folder.mkdir(parents=True)
        write_gguf(Path(source), folder / "float.gguf")
        parameters = lib.llama_model_quantize_default_params()
        parameters.ftype = FILE_TYPES[weights]
        files = [str(folder / name).encode() for name in ("float.gguf", "model.gguf")]
        if lib.llama_model_quantize(*files, ctypes.byref(parameters)):
            raise RuntimeError("llama_model_quantize failed")
        (folder / "float.gguf").unlink()

    def load(self, directory: str, tokens: int, batch: int, threads: int, cache: str) -> str:
        """Load, and say with what.

        Raises:
            RuntimeError: llama.cpp could not.
        """
        self.directory, self.sequences = Path(directory), batch
        self.setting = (cache, tokens, batch)
        lib.llama_backend_init()
        file = str(self.directory / "model.gguf").encode()
        self.model = lib.llama_model_load_from_file(file, lib.llama_model_default_params())
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = tokens * batch
        parameters.n_batch = TOKENS_AT_ONCE
        parameters.n_seq_max = batch
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = CACHE_TYPES[cache]
        parameters.flash_attn_type = 1
        self.context = self.model and lib.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"{self.directory}: llama.cpp cannot load it")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(TOKENS_AT_ONCE, 0, 1)
        return f"llama-cpp-python {lib.__version__}"

    def _decode(self, tokens: Sequence[tuple[int, int, int, bool]]) -> np.ndarray:
        """Logits `[wanted, vocabulary]`, in llama.cpp's memory, of (token, position, sequence, is wanted)."""
        for index, (token, position, sequence, wanted) in enumerate(tokens):
            self.batch.token[index], self.batch.pos[index] = token, position
            self.batch.n_seq_id[index], self.batch.seq_id[index][0] = 1, sequence
            self.batch.logits[index] = wanted
        self.batch.n_tokens = len(tokens)
        if lib.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")
        count = sum(wanted for *_, wanted in tokens)
        return np.ctypeslib.as_array(lib.llama_get_logits(self.context), (count, self.vocabulary)) if count else None

    def _read(self, prompts: list[list[int]]) -> list[int]:
        """Read the prompts, one after the other; the likeliest token behind each."""
        likeliest = []
        for sequence, ids in enumerate(prompts):
            for start in range(0, len(ids), TOKENS_AT_ONCE):
                positions = range(start, min(start + TOKENS_AT_ONCE, len(ids)))
                logits = self._decode([(ids[at], at, sequence, at == len(ids) - 1) for at in positions])
            likeliest.append(int(logits[0].argmax()))
        return likeliest

    def _state(self, prompts: list[list[int]]) -> Path:
        """Where the state behind long prompts is kept, which takes minutes to come to."""
        digest = hashlib.sha256(json.dumps([prompts, self.setting]).encode()).hexdigest()
        return self.directory / f"state-{digest[:16]}"

    def _restored(self, state: Path) -> list[int]:
        """The newest tokens of a kept state, which is taken up; none if there is none."""
        if not state.exists():
            return []
        tokens, count = (lib.llama_token * self.sequences)(), ctypes.c_size_t()
        found = lib.llama_state_load_file(self.context, str(state).encode(), tokens, len(tokens), ctypes.byref(count))
        return list(tokens) if found else []

    def measure(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Time passes, greedy; the first token is not timed where a kept state takes the place of the prompt."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        state = self._state(prompts)
        newest, first = self._restored(state), None
        if not newest:
            began = time.perf_counter()
            newest = self._read(prompts)
            first = time.perf_counter() - began
            if first > KEEP_FROM:
                tokens = (lib.llama_token * self.sequences)(*newest)
                lib.llama_state_save_file(self.context, str(state).encode(), tokens, len(tokens))
        times = [time.perf_counter()]
        for position in range(len(prompts[0]), len(prompts[0]) + new):
            logits = self._decode([(token, position, sequence, True) for sequence, token in enumerate(newest)])
            newest = logits.argmax(1).tolist()
            times.append(time.perf_counter())
        return {"first": first, "steps": steps(times)}

    def logits(self, ids: list[int], prompt: int, chunk: int, into: str) -> None:
        """Write the logits behind a prompt."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        found, position = [], 0
        for piece in chunks(ids, prompt, chunk):
            wanted = position > 0
            logits = self._decode([(token, position + at, 0, wanted) for at, token in enumerate(piece)])
            position += len(piece)
            if wanted:
                found.append(logits.copy())
        np.save(into, np.concatenate(found))


if __name__ == "__main__":
    serve(LlamaCppEngine())
