"""The server: requests that go on from the one before, and OpenAI's own client over loopback."""

import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from octavo.__main__ import main
from octavo.common.architecture import load_architecture
from octavo.common.errors import OctavoError
from octavo.generate import Speaker, load_converted, load_stock
from octavo.serving import Answers, check_port, check_server

from ..support import assert_one_error_line, random_ids
from .server import SECONDS, free_port, serving

pytestmark = pytest.mark.usefixtures("one_thread")

C8 = ("--use_kvcache_quant", "True")


@pytest.fixture(params=["converted", "int8-token", "octavo-4"])
def speaker(request: pytest.FixtureRequest, converted: Callable[..., Path], source: Path) -> Speaker:
    """A converted directory, and stock models with a scheme."""
    if request.param == "converted":
        return load_converted(load_architecture("llama3"), converted(*C8), "cpu")
    return load_stock(source, request.param, None, "cpu")


def greedy(tokens: int = 5, **fields: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=2, **fields)


def request(ids: torch.Tensor, **fields: Any) -> dict[str, Any]:
    """What transformers' server gives `generate`."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_config": greedy(**fields)}


def test_a_conversation_is_read_once_and_answered_as_if_it_were_anew(speaker: Speaker) -> None:
    told: list[str] = []
    answers = Answers(speaker, told.append)
    first = answers(**request(random_ids(1, 30)))
    assert first.shape == (1, 35) and told[-1].startswith("30 tokens read, 0 kept from the request before; 5 tokens, ")
    second = torch.cat((first, random_ids(1, 8, seed=2)), dim=1)
    found = answers(**request(second))
    assert told[-1].startswith("9 tokens read, 34 kept from the request before; 5 tokens, ")
    assert "KV cache of 47 tokens: " in told[-1]
    assert torch.equal(found, Answers(speaker, told.append)(**request(second)))


def test_what_differs_is_read_anew(speaker: Speaker) -> None:
    told: list[str] = []
    answers = Answers(speaker, told.append)
    ids = random_ids(1, 30)
    answers(**request(ids))
    edited = ids.clone()
    edited[0, 20] = (edited[0, 20] + 1) % 300 + 3
    found = answers(**request(edited))
    assert told[-1].startswith("10 tokens read, 20 kept from the request before")
    assert torch.equal(found, Answers(speaker, told.append)(**request(edited)))
    answers(**request(random_ids(1, 12, seed=5)))
    assert told[-1].startswith("12 tokens read, 0 kept")


def test_beams_and_batches_have_a_cache_of_their_own(speaker: Speaker) -> None:
    answers = Answers(speaker, lambda line: None)
    ids = random_ids(1, 20)
    assert answers(**request(ids, num_beams=2)).shape == (1, 25)
    assert answers(**request(random_ids(2, 20))).shape == (2, 25)
    told: list[str] = []
    answers._say = told.append
    answers(**request(ids))
    assert told == [told[0]] and told[0].startswith("20 tokens read, 0 kept")


def test_what_a_cancelled_request_left_is_forgotten(speaker: Speaker) -> None:
    told: list[str] = []
    answers = Answers(speaker, told.append)
    ids = random_ids(1, 20)

    class Ends:
        def put(self, tokens: torch.Tensor) -> None:
            raise KeyboardInterrupt

        def end(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        answers(**request(ids), streamer=Ends())
    answers(**request(ids))
    assert told[-1].startswith("20 tokens read, 0 kept")


def test_the_same_seed_says_the_same_whatever_was_asked_before(speaker: Speaker) -> None:
    told: list[str] = []
    answers, ids = Answers(speaker, told.append), random_ids(1, 20)

    def sampled(seed: int) -> torch.Tensor:
        asked = request(ids)
        asked["generation_config"].update(do_sample=True, temperature=2.0, top_k=0)
        asked["generation_config"].seed = seed
        return answers(**asked)

    first = sampled(1)
    assert not torch.equal(first, sampled(2)) and torch.equal(first, sampled(1))
    assert all(line.startswith("20 tokens read, 0 kept") for line in told)


def test_what_cannot_be_cropped_is_computed_anew_and_said(source: Path) -> None:
    """octavo-4 keeps 64 tokens in float, and gives back no more than these."""
    told: list[str] = []
    speaker = load_stock(source, "octavo-4", None, "cpu")
    answers = Answers(speaker, told.append)
    ids = random_ids(1, 300)
    answers(**request(ids))
    found = answers(**request(ids[:, :100]))
    assert told[-2].startswith("the conversation is computed anew: ") and told[-1].startswith("100 tokens")
    assert torch.equal(found, Answers(speaker, told.append)(**request(ids[:, :100])))


# Over loopback


@pytest.fixture(scope="module")
def served(converted: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of a converted directory, and what it says."""
    pytest.importorskip("uvicorn")
    directory = shutil.copytree(converted(*C8), tmp_path_factory.mktemp("served") / "tiny quantized")
    with (directory / "chat_template.jinja").open("a") as template:
        template.write("{% if tools %}{{ tools | tojson }}{% endif %}")
    with serving([sys.executable, "-m", "octavo"], directory) as found:
        yield found


@pytest.mark.slow
def test_the_openai_client_talks_streams_and_names_tools(served: tuple[str, list[str]]) -> None:
    openai = pytest.importorskip("openai")
    address, lines = served
    client = openai.OpenAI(base_url=address, api_key="none", timeout=SECONDS, max_retries=0)
    (model,) = [found.id for found in client.models.list()]
    assert model == "tiny quantized"
    messages = [{"role": "user", "content": "Rain fell on the hill."}]
    asked = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert 0 < whole.usage.completion_tokens <= 8
    pieces = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**asked, stream=True)
              if part.choices]  # fmt: skip
    said = whole.choices[0].message.content
    assert "".join(pieces).rstrip("\ufffd") == said.rstrip("\ufffd")  # a stream ends before half a character
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
    client.chat.completions.create(**asked)
    text = client.completions.create(model=model, prompt="Rain fell", max_tokens=4, temperature=0)
    assert text.choices[0].text
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    plain, with_tools = (client.chat.completions.create(**asked, **tools) for tools in ({}, {"tools": [tool]}))
    assert with_tools.usage.prompt_tokens > plain.usage.prompt_tokens + 20  # the template has said which there are
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{**asked, "model": "another"})
    told = [line for line in lines if " tokens read, " in line]
    assert len(told) == 6 and all("KV cache of" in line and " bytes (" in line for line in told)
    assert ", 0 kept" in told[0] and ", 0 kept" not in told[1] + told[2]


@pytest.mark.slow
def test_a_request_samples_ends_and_is_refused_as_openai_does(served: tuple[str, list[str]]) -> None:
    openai = pytest.importorskip("openai")
    address, lines = served
    client = openai.OpenAI(base_url=address, api_key="none", timeout=SECONDS, max_retries=0)
    chat = {"model": "tiny quantized", "messages": [{"role": "user", "content": "Rain fell."}], "max_tokens": 8}
    text = {"model": "tiny quantized", "prompt": "Rain fell", "max_tokens": 8}

    def said(stream: bool = False, **fields: Any) -> tuple[str, str]:
        """What a chat and a completion say."""
        talk = client.chat.completions.create(**chat, **fields, stream=stream)
        more = client.completions.create(**text, **fields, stream=stream)
        if not stream:
            return talk.choices[0].message.content, more.choices[0].text
        return ("".join(part.choices[0].delta.content or "" for part in talk if part.choices),
                "".join(part.choices[0].text for part in more))  # fmt: skip

    first = said(temperature=1.5, seed=1)
    assert first == said(temperature=1.5, seed=1) and first != said(temperature=1.5, seed=2)
    assert said(temperature=0, seed=1) == said(temperature=0, seed=2) != first
    streams = [said(stream=True, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert streams[0] == streams[1] != streams[2]
    stop = first[1][2]
    for stream in (False, True):
        ended = said(stream=stream, temperature=1.5, seed=1, stop=[stop])
        assert ended == tuple(each.partition(stop)[0] for each in first)
    for fields in ({"n": 2}, {"presence_penalty": 1}, {"frequency_penalty": 1}, {"model": "another"}):
        for ask, body in ((client.chat.completions.create, chat), (client.completions.create, text)):
            with pytest.raises(openai.BadRequestError) as refused:
                ask(**{**body, **fields})
            told = refused.value.body
            assert (told["type"], told["param"]) == ("invalid_request_error", *fields) and told["message"]
    assert not any("generation flags are not valid" in line for line in lines)


@pytest.mark.parametrize("port", [-1, 0, 65536, 99999])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    """The system would listen at another, as 99999 - 65536."""
    with pytest.raises(OctavoError, match=f"--port {port}: is no port; give one from 1 to 65535"):
        check_port("127.0.0.1", port)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(OctavoError, match=f"--host 127.0.0.1 --port {port}: cannot listen there"):
            check_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--continuous_batching"], ("no attention but its own", "octavo rewrite ", "--format compressed-tensors")),
        (["--scheme", "int8-token"], ("has a scheme of its own",)),
    ],
)
def test_what_cannot_be_served_is_refused(
    flags: list[str], parts: tuple[str, ...], converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = converted(*C8)
    capsys.readouterr()
    assert main(["serve", str(directory), "--port", str(free_port()), *flags]) == 1
    assert_one_error_line(capsys.readouterr().err, *parts)


def test_an_interrupted_server_ends_without_an_error(
    converted: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As uvicorn does: it shuts down, says so, and raises the signal again."""
    pytest.importorskip("uvicorn")

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("uvicorn.Server.run", interrupted)
    directory = converted(*C8)
    capsys.readouterr()
    assert main(["serve", str(directory), "--port", str(free_port())]) == 0
    assert "error" not in capsys.readouterr().err


def test_a_server_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(OctavoError, match=r"pip install 'transformers\[serving\]'"):
        check_server()


def test_a_format_is_named_only_if_it_holds_the_model(
    converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """octavo-4 is in none that vLLM reads, and what is written by --scheme int8-token is."""
    said = []
    for scheme in ("octavo-4", "int8-token"):
        directory = converted("--scheme", scheme, "--w_bit", "8", "--a_bit", "16")
        capsys.readouterr()
        assert main(["serve", str(directory), "--continuous_batching"]) == 1
        said.append(capsys.readouterr().err)
    assert "rewrite" not in said[0] and said[0].rstrip().endswith("leave it out")
    assert "octavo rewrite " in said[1] and "--format compressed-tensors" in said[1]


def test_a_hub_id_is_proposed_what_works(
    source: Path,
    converted: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rewriting takes its snapshot, and what is written lies where one stands."""
    directory = converted("--scheme", "int8-token", "--w_bit", "8", "--a_bit", "16")
    monkeypatch.chdir(tmp_path)
    for found, command in (
        (source, "octavo convert someone/tiny --quantization w8a8_dynamic"),
        (directory, f"octavo rewrite '{directory}'"),
    ):
        monkeypatch.setattr(
            "octavo.common.convert.source.checkpoint.snapshot_download", lambda *_, found=found, **__: str(found)
        )
        capsys.readouterr()
        assert main(["serve", "someone/tiny", "--continuous_batching"]) == 1
        rest = "--format compressed-tensors --save_directory tiny-vllm"
        assert_one_error_line(capsys.readouterr().err, f"{command} {rest}")
    assert main(shlex.split(f"{command} {rest}")[1:]) == 0 and (tmp_path / "tiny-vllm" / "config.json").is_file()
