"""The run script: what it prints, chats that go on, and damaged directories."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from octavo import QuantizedCache
from octavo.common.runtime.packed_weight import PackedWeight
from octavo.generate import common_length, keep, load_converted, main
from octavo.models.llama3 import ARCHITECTURE
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ..support import REPOSITORY, assert_one_error_line, edit_json, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

C8 = ("--use_kvcache_quant", "True")
DESCRIPTION, WEIGHTS = "quant_model_description.json", "quant_model_weight_w8a8.safetensors"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
SCALE = "model.layers.1.self_attn.k_proj.kv_cache_scale"


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def drop_everywhere(directory: Path, name: str) -> None:
    change_weights(directory, lambda tensors: tensors.pop(name))
    edit_json(directory / DESCRIPTION, **{name: None})


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda d: (d / "config.json").unlink(), ("config.json",)),
    "broken config": (lambda d: (d / "config.json").write_text("{"), ("config",)),
    "other width": (lambda d: edit_json(d / "config.json", hidden_size=128), ("[320, 64]",)),
    "other KV heads": (lambda d: edit_json(d / "config.json", num_key_value_heads=4), ("k_proj",)),
    "other head width": (lambda d: edit_json(d / "config.json", head_dim=8), ("_proj",)),
    "other vocabulary": (lambda d: edit_json(d / "config.json", vocab_size=5), ("stored as [320, 64]",)),
    "more layers": (lambda d: edit_json(d / "config.json", num_hidden_layers=4), ("config.json",)),
    "fewer layers": (lambda d: edit_json(d / "config.json", num_hidden_layers=2), ("of 3 layers",)),
    "words for numbers": (lambda d: edit_json(d / "config.json", num_attention_heads="four"), ("four",)),
    "octavo key is a number": (lambda d: edit_json(d / "config.json", octavo=5), ("octavo",)),
    "unknown scheme": (lambda d: edit_json(d / "config.json", octavo={"scheme": "int7"}), ("int7", "int8-token")),
    "unknown field": (lambda d: edit_json(d / "config.json", octavo={"scheme": {"name": "x", "foo": 1}}), ("foo",)),
    "quantized weight labelled FLOAT": (lambda d: edit_json(d / DESCRIPTION, **{UP: "FLOAT"}), (UP, "FLOAT")),
    "float weight labelled W8A8": (lambda d: edit_json(d / DESCRIPTION, **{DOWN: "W8A8"}), (DOWN, "W8A8")),
    "unknown label": (lambda d: edit_json(d / DESCRIPTION, **{UP: "W4A4"}), (UP, "W4A4")),
    "label removed": (lambda d: edit_json(d / DESCRIPTION, **{UP: None}), (UP, "not described")),
    "scale's label removed": (lambda d: edit_json(d / DESCRIPTION, **{SCALE: None}), (SCALE, "not described")),
    "label too many": (lambda d: edit_json(d / DESCRIPTION, foo="FLOAT"), ("foo", "not stored")),
    "other kind of model": (lambda d: edit_json(d / DESCRIPTION, model_quant_type="W4A4"), ("w4a4",)),
    "other kind of cache": (lambda d: edit_json(d / DESCRIPTION, kv_cache_type="C4"), ("kv_cache_type", "C4")),
    "no description": (lambda d: (d / DESCRIPTION).unlink(), (DESCRIPTION, "missing")),
    "broken description": (lambda d: (d / DESCRIPTION).write_text("{"), (DESCRIPTION,)),
    "description is a list": (lambda d: (d / DESCRIPTION).write_text("[]"), (DESCRIPTION, "object")),
    "tensor removed": (lambda d: change_weights(d, lambda t: t.pop(UP)), (UP, "not stored")),
    "tensor too many": (lambda d: change_weights(d, lambda t: t.update(foo=torch.ones(2))), ("foo", "not described")),
    "tensor removed everywhere": (lambda d: drop_everywhere(d, "model.norm.weight"), ("model.norm.weight", "missing")),
    "tensor of another shape": (
        lambda d: change_weights(d, lambda t: t.update({UP: t[UP][:, :32].contiguous()})),
        (UP, "[128, 32]"),
    ),
    "NaN in a scale": (lambda d: change_weights(d, lambda t: t[SCALE].fill_(float("nan"))), (SCALE, "NaN")),
    "scale of 0": (lambda d: change_weights(d, lambda t: t[SCALE].fill_(0)), ("k_proj", "positive")),
    "truncated weights": (lambda d: os.truncate(d / WEIGHTS, 100_000), (WEIGHTS, "truncated")),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), (WEIGHTS,)),
    "no tokenizer": (
        lambda d: [(d / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        ("tokenizer",),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory(
    damage: str, converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, parts = DAMAGES[damage]
    directory = tmp_path / "damaged"
    shutil.copytree(converted(*C8), directory)
    change(directory)
    capsys.readouterr()
    assert main(ARCHITECTURE, ["--model_path", str(directory), "--prompt", "Rain", "--max_new_tokens", "2"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_error_line(captured.err, *parts)


def test_a_missing_shard(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from octavo.common.convert import api as convert

    from ..support import convert_flags

    monkeypatch.setattr("octavo.common.convert.run.GIGABYTE", 100_000)
    assert convert.main(ARCHITECTURE, convert_flags(source, tmp_path / "out", "--part_file_size", "1")) == 0
    shard = sorted((tmp_path / "out").glob("quant_model_weight_w8a8-0*"))[1]
    shard.unlink()
    capsys.readouterr()
    assert main(ARCHITECTURE, ["--model_path", str(tmp_path / "out"), "--prompt", "Rain"]) == 1
    assert_one_error_line(capsys.readouterr().err, shard.name, "missing")


BAD_FLAGS = [
    ([], "--prompt"),
    (["--prompt", "Rain", "--nonsense"], "--nonsense"),
    (["--prompt", "Rain", "--max_new_tokens", "0"], "--max_new_tokens"),
    (["--prompt", "Rain", "--max_new_tokens", "many"], "--max_new_tokens"),
    (["--prompt", "Rain", "--temperature", "1"], "--temperature"),
    (["--prompt", "Rain", "--do_sample", "--temperature", "0"], "--temperature"),
    (["--prompt", "Rain", "--do_sample", "--temperature", "-1"], "--temperature"),
    (["--prompt", "Rain", "--do_sample", "--temperature", "nan"], "--temperature"),
    (["--prompt", "Rain", "--do_sample", "--temperature", "inf"], "--temperature inf: is no number above 0"),
    (["--prompt", "Rain", "--top_p", "0.9"], "--top_p: needs --do_sample"),
    (["--prompt", "Rain", "--top_k", "9"], "--top_k: needs --do_sample"),
    (["--prompt", "Rain", "--seed", "0"], "--seed: needs --do_sample"),
    (["--prompt", "Rain", "--do_sample", "--top_p", "0"], "--top_p 0.0: is not above 0 and at most 1"),
    (["--prompt", "Rain", "--do_sample", "--top_p", "1.01"], "--top_p 1.01: is not above 0 and at most 1"),
    (["--prompt", "Rain", "--do_sample", "--top_p", "nan"], "--top_p nan"),
    (["--prompt", "Rain", "--do_sample", "--top_k", "-1"], "--top_k"),
    (["--prompt", "Rain", "--do_sample", "--seed", str(2**64)], "has more than 64 bits"),
    (["--prompt", "Rain", "--system", "You are rain."], "--system: needs --chat"),
    (["--prompt", "Rain", "--device_type", "tpu"], "--device_type"),
    (["--prompt", ""], "--prompt"),
]


@pytest.mark.parametrize(("flags", "part"), BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_a_bad_flag(
    flags: list[str], part: str, converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(converted(*C8))
    capsys.readouterr()
    try:
        code = main(ARCHITECTURE, ["--model_path", directory, *flags])
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    assert_one_error_line(capsys.readouterr().err, part)


@pytest.mark.parametrize(("path", "reason"), [("nowhere", "no such directory"), (".", "holds no config.json")])
def test_a_path_that_is_no_checkpoint(
    path: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ARCHITECTURE, ["--model_path", str(tmp_path / path), "--prompt", "Rain"]) == 1
    assert_one_error_line(capsys.readouterr().err, reason)


def test_a_prompt_is_continued(converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    directory = converted(*C8)
    capsys.readouterr()
    argv = ["--model_path", str(directory), "--prompt", "Rain fell on", "--max_new_tokens", "9"]
    assert main(ARCHITECTURE, argv) == 0
    captured = capsys.readouterr()
    ids = tiny_tokenizer()("Rain fell on", return_tensors="pt")["input_ids"]
    model = LlamaForCausalLM.from_pretrained(directory)
    expected = model.generate(ids, max_new_tokens=9, do_sample=False)
    assert captured.out == tiny_tokenizer().decode(expected[0], skip_special_tokens=True) + "\n"
    stored = expected.shape[1] - 1
    report = captured.err.splitlines()[-1]
    assert (
        f"KV cache of {stored} tokens: {stored * 192:,} bytes" in report
        and f"float32 would take {stored * 768:,}" in report
    )


def test_samples_are_as_the_flags_say_and_else_as_the_model_does(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(converted(*C8), tmp_path / "out")
    capsys.readouterr()

    def said(*flags: str) -> str:
        argv = ["--model_path", str(directory), "--prompt", "Rain fell on", "--max_new_tokens", "12"]
        assert main(ARCHITECTURE, [*argv, *flags]) == 0
        return capsys.readouterr().out

    greedy, sample = said(), ("--do_sample", "--seed", "3")
    assert said(*sample) == said(*sample) != greedy
    assert said("--do_sample", "--seed", "4") != said(*sample)
    assert said("--do_sample", "--top_k", "1") == said("--do_sample", "--top_p", "1e-9") == greedy
    assert said("--do_sample", "--temperature", "1e-6") == greedy
    edit_json(directory / "generation_config.json", do_sample=True, top_k=1)
    assert said("--do_sample") == greedy, "which is what generation_config.json says"
    assert said(*sample, "--top_k", "0") != greedy


def test_weights_that_are_where_they_run_stay_packed(converted: Callable[..., Path]) -> None:
    model = load_converted(ARCHITECTURE, converted("--quantization", "w8a16", "--group_size", "32"), "cpu").model
    linears = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert linears and all(linear._panels is not None for linear in linears)


def chat(monkeypatch: pytest.MonkeyPatch, directory: Path, messages: list[str], *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(messages) + "\n"))
    return main(ARCHITECTURE, ["--model_path", str(directory), "--chat", "--max_new_tokens", "7", *flags])


@pytest.mark.parametrize("system", [None, "Speak of the weather alone."])
def test_a_chat_goes_on_from_its_cache(
    system: str | None,
    converted: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answers are those that a model without any cache gives to the whole conversation."""
    directory = converted(*C8)
    capsys.readouterr()
    questions = ["What fell?", "And then?", "Who saw it?"]
    assert chat(monkeypatch, directory, questions, *([] if system is None else ["--system", system])) == 0
    answers = capsys.readouterr().out.splitlines()

    model, tokenizer, expected = LlamaForCausalLM.from_pretrained(directory), tiny_tokenizer(), []
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        result = model.generate(**ids, max_new_tokens=7, do_sample=False, use_cache=False)
        answer = tokenizer.decode(result[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        expected += answer.splitlines() or [""]
    assert answers == expected


def test_a_chat_without_a_template_is_refused(
    converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "no template"
    shutil.copytree(converted(*C8), directory)
    (directory / "chat_template.jinja").unlink()
    capsys.readouterr()
    assert chat(monkeypatch, directory, ["Hello"]) == 1
    assert_one_error_line(capsys.readouterr().err, "no chat template", "octavo run")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}", "No system role"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "does not tell it to the model"),
    ],
)
def test_a_system_prompt_that_the_template_does_not_take(
    template: str,
    reason: str,
    converted: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = shutil.copytree(converted(*C8), tmp_path / "out")
    (directory / "chat_template.jinja").write_text(template)
    capsys.readouterr()
    assert chat(monkeypatch, directory, ["Hello"], "--system", "You are rain.") == 1
    assert_one_error_line(capsys.readouterr().err, "--system: the chat template", reason, "leave it out")


@pytest.mark.parametrize(
    ("cached", "ids", "length"),
    [
        ([], [1, 2], 0),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 2, 3], 2),
        ([1, 9, 3], [1, 2, 3, 4], 1),
        ([5], [1], 0),
    ],
)
def test_how_much_of_a_cache_a_new_turn_keeps(cached: list[int], ids: list[int], length: int) -> None:
    row = torch.tensor([cached], dtype=torch.long)
    assert common_length(row, torch.tensor([ids])) == length


def test_the_script_as_a_user_runs_it(converted: Callable[..., Path]) -> None:
    script = REPOSITORY / "models" / "llama3" / "run.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--model_path", str(converted(*C8)), "--prompt", "Rain", "--do_sample"]
    done = subprocess.run([*command, "--max_new_tokens", "3"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("Rain"), done.stderr


def test_a_turn_before_which_layers_that_slide_have_forgotten_begins_anew() -> None:
    told: list[str] = []
    config = transformers.MistralConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=8
    )
    cache = QuantizedCache(config)
    for layer in range(2):
        cache.update(torch.randn(1, 1, 300, 8), torch.randn(1, 1, 300, 8), layer)
    keep(cache, 290, told.append)
    assert cache.get_seq_length() == 290 and not told
    keep(cache, 100, told.append)
    assert cache.get_seq_length() == 0 and "computed anew: crop(-190)" in told[0]
