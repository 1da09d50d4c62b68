"""A source that only looks like its architecture is refused by the name of what differs, before anything is written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from octavo.common.convert.api import main
from octavo.models import llama3

from ...support import convert_flags, save_source, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


def extra_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama with a norm behind attention."""
    plain = modeling_llama.LlamaDecoderLayer.__init__

    def init(self: nn.Module, config: object, layer_idx: int) -> None:
        plain(self, config, layer_idx)
        self.post_feedforward_layernorm = modeling_llama.LlamaRMSNorm(config.hidden_size)

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__init__", init)


def offset_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that multiply by 1 + w."""
    plain = modeling_llama.LlamaRMSNorm.forward

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        normed = x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        return plain(self, hidden_states) + normed.to(hidden_states.dtype)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)


def fused_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """One linear that makes gate and up."""
    plain = modeling_llama.LlamaMLP.__init__

    def init(self: nn.Module, config: object) -> None:
        plain(self, config)
        self.gate_up_proj = nn.Linear(self.hidden_size, 2 * self.intermediate_size, bias=False)
        del self.gate_proj, self.up_proj

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", init)


def scaled_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama whose decoder multiplies embeddings."""
    plain = modeling_llama.LlamaModel.forward

    def forward(self: nn.Module, input_ids: torch.Tensor | None = None, **given: object) -> object:
        embedded = given.pop("inputs_embeds", None)
        return plain(self, inputs_embeds=2 * (self.embed_tokens(input_ids) if embedded is None else embedded), **given)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)


def divided_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama that divides its logits."""
    plain = modeling_llama.LlamaForCausalLM.forward

    def forward(self: nn.Module, *args: object, **given: object) -> object:
        found = plain(self, *args, **given)
        found.logits = found.logits / 2
        return found

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", forward)


def interleaved_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE that turns channel 2i with 2i + 1, as GPT-J's."""

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = cos.shape[-1] // 2
        cos, sin = (part[:, None, :, :half].repeat_interleave(2, dim=-1) for part in (cos, sin))
        turned = (torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) for x in (q, k))
        return tuple(x * cos + part * sin for x, part in zip((q, k), turned, strict=True))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)


CHANGED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "an extra norm": (extra_norm, "layers.0.post_feedforward_layernorm: is there and not stated (in models/llama3)"),
    "(1 + w) norms": (offset_norms, "norm: is not of the form that is stated for norms (in models/llama3)"),
    "scaled states": (scaled_states, "layers.0: is not given embeddings as they are stated to be"),
    "divided logits": (divided_logits, "lm_head: logits are not what it makes, as they are stated to be"),
    "interleaved RoPE": (interleaved_rope, "layers.0.self_attn: RoPE does not pair channels by halves of a head"),
    "a fused projection": (fused_projection, "layers.0.mlp.gate_proj: is stated and not there (in models/llama3)"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_source_with_another_anatomy_is_refused_by_name(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_source(tmp_path / "source", tiny_llama())
    apply, message = CHANGED[change]
    apply(monkeypatch)
    capsys.readouterr()
    assert main(llama3.ARCHITECTURE, convert_flags(source, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not (tmp_path / "out").exists()


def test_a_layer_that_smoothing_changes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has the modules of a Llama, and squares what up makes, is found by its outputs."""
    source = save_source(tmp_path / "source", tiny_llama())

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).square())

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    assert main(llama3.ARCHITECTURE, convert_flags(source, tmp_path / "plain", "--is_dynamic", "True")) == 0
    capsys.readouterr()
    flags = convert_flags(source, tmp_path / "out", "--is_dynamic", "True", "--anti_method", "m4")
    assert main(llama3.ARCHITECTURE, flags) == 1
    error = capsys.readouterr().err
    assert "model.layers.0: --anti_method changed what it computes: LlamaDecoderLayer" in error
    assert not (tmp_path / "out").exists()
