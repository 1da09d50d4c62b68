"""The worker of OpenVINO: GenAI's pipeline is timed, and the runtime under it gives the logits."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker import chunks, serve, steps

EXPORT = ("export", "openvino", "--task", "text-generation-with-past")


class OpenVinoEngine:
    """A directory that optimum-intel exported."""

    def prepare(self, source: str, into: str, weights: str, flags: list[str]) -> None:
        """Export, weights compressed."""
        command = [str(Path(sys.executable).with_name("optimum-cli")), *EXPORT, "--weight-format", weights, *flags]
        subprocess.run([*command, "--model", source, into], check=True, stdout=sys.stderr)

    def load(self, directory: str, tokens: int, batch: int, threads: int, cache: str) -> str:
        """Remember what is to be loaded: a pipeline and a compiled model hold weights each, and one of them is used."""
        self.directory = Path(directory)
        self.properties = {"KV_CACHE_PRECISION": cache, "INFERENCE_NUM_THREADS": threads}
        self.pipeline = None
        return f"openvino-genai {version('openvino-genai')}"

    def _load_pipeline(self) -> openvino_genai.LLMPipeline:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 1 << 20  # the whole prompt at once, as without a scheduler
        scheduler.enable_prefix_caching = False
        return openvino_genai.LLMPipeline(self.directory, "CPU", scheduler_config=scheduler, **self.properties)

    def measure(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Time `generate`, greedy, by its own metrics."""
        if self.pipeline is None:
            self.pipeline = self._load_pipeline()
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = openvino_genai.GenerationConfig(max_new_tokens=new + 1, ignore_eos=True, do_sample=False)
        metrics = self.pipeline.generate(inputs, config).perf_metrics
        times = metrics.raw_metrics.m_new_token_times
        return {
            "first": metrics.get_ttft().mean / 1e3,
            "steps": [milliseconds / 1e3 for milliseconds in steps(times)],
        }

    def logits(self, ids: list[int], prompt: int, chunk: int, into: str) -> None:
        """Write the logits behind a prompt."""
        core = openvino.Core()
        model = core.compile_model(self.directory / "openvino_model.xml", "CPU", self.properties)
        request = model.create_infer_request()
        found, seen = [], 0
        for piece in chunks(ids, prompt, chunk):
            positions = np.arange(seen, seen + len(piece), dtype=np.int64)[None]
            seen += len(piece)
            outputs = request.infer(
                {
                    "input_ids": np.array([piece], dtype=np.int64),
                    "attention_mask": np.ones((1, seen), dtype=np.int64),
                    "position_ids": positions,
                    "beam_idx": np.zeros(1, dtype=np.int32),
                }
            )
            found.append(outputs["logits"][0].astype(np.float32))
        np.save(into, np.concatenate(found[1:]))


if __name__ == "__main__":
    serve(OpenVinoEngine())
