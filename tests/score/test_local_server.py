"""The judge against a real server: `transformers serve` on this machine, with a chat model of random weights."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from salmonn.cli.options import SOME_FAILED
from salmonn.files import write_records
from salmonn.preference.reward import make_llm_client
from salmonn.records import Caption, Event, Reference, Score, Unscored
from salmonn.score.config import JudgeConfig
from salmonn.score.formats import read_scores
from tests.limits import RUN_SECONDS, STEP_SECONDS
from tests.score.local_server import LocalServer, make_chat_model, serve_locally

pytestmark = pytest.mark.slow  # test_llm_client.py and test_llm_judge.py use a scripted server

REFERENCES = [
    Reference(video, (Event("a red circle appears"), Event("a low tone is heard", "audio")))
    for video in ("one.mp4", "two.mp4", "three.mp4")
]
CAPTIONS = [Caption("one.mp4", "A red circle appears."), Caption("two.mp4", "A low tone is heard.")]


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> LocalServer:
    folder = tmp_path_factory.mktemp("server")
    make_chat_model(folder / "model")
    with serve_locally(folder / "model", log_path=folder / "log") as local_server:
        yield local_server


@pytest.fixture
def complete(server):
    """Send requests with OpenAI's own client."""
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=STEP_SECONDS) as client:

        def create(text: str, **options):
            messages = [{"role": "user", "content": text}]
            return client.chat.completions.create(model=server.model, messages=messages, **options)

        yield create


def test_token_counts_and_the_token_limit(complete):
    completion = complete("hi", max_tokens=5, temperature=0)
    # Turn start, "user\nhi", turn end, "\n", turn start, "assistant\n"; a character is a token: 1 + 7 + 1 + 1 + 1 + 10.
    assert completion.usage.prompt_tokens == 21
    assert completion.usage.completion_tokens == 5 and completion.usage.total_tokens == 26
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].message.content


def test_seed_and_temperature_reach_the_model(complete):
    def answer(**options) -> str:
        return complete("hi", max_tokens=20, **options).choices[0].message.content

    assert answer(seed=1) == answer(seed=1) != answer(seed=2)
    assert answer(seed=1, temperature=0) == answer(seed=2, temperature=0)


def test_concurrent_requests_get_their_own_replies(complete):
    def answer(text: str) -> str:
        return complete(text, max_tokens=20, temperature=0).choices[0].message.content

    texts = ["one", "two", "three", "four"]
    expected = [answer(text) for text in texts]
    assert len(set(expected)) == 4
    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(answer, texts)) == expected


def test_schema_is_accepted_and_ignored(complete):
    # This is why replies are parsed strictly even if the server accepts the schema.
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    text = complete("hi", max_tokens=5, temperature=0, response_format=form).choices[0].message.content
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


def test_rejects_fields_that_are_not_openais(complete):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        complete("hi", max_tokens=1, extra_body={"top_k": 1})
    assert "top_k" in caught.value.body["detail"]


@pytest.fixture
def score(server, tmp_path):
    """Run `salmonn score` with the server as judge: exit code, stderr, and contents of the score file."""
    write_records(tmp_path / "refs.jsonl", REFERENCES)
    write_records(tmp_path / "captions.jsonl", CAPTIONS)
    command = [str(Path(sys.executable).with_name("salmonn")), "score", str(tmp_path / "captions.jsonl")]
    command += ["--references", str(tmp_path / "refs.jsonl"), "--cache", str(tmp_path / "replies.sqlite")]
    command += ["--judge", "openai", "--base-url", server.base_url, "--model", server.model]
    command += ["--max-reply-tokens", "30", "--attempts", "2"]

    def run() -> tuple[int, str, list[Score | Unscored]]:
        out = tmp_path / "scores.jsonl"
        result = subprocess.run(
            [*command, "--out", str(out)], capture_output=True, text=True, timeout=RUN_SECONDS, check=False
        )
        scores = read_scores(out)
        return result.returncode, result.stderr, [*scores.scores, *scores.unscored]

    return run


def test_invalid_replies_are_cached_and_their_captions_unscored(server, score):
    before = server.num_requests
    code, err, results = score()
    assert code == SOME_FAILED and "Traceback" not in err
    # The video without a caption needs no request, the others two each.
    assert [(type(result), result.video) for result in results] == [
        (Score, "three.mp4"),
        (Unscored, "one.mp4"),
        (Unscored, "two.mp4"),
    ]
    assert all("no usable reply in 2 attempts" in result.reason for result in results[1:])
    assert server.num_requests - before == 4

    assert score()[2] == results
    assert server.num_requests - before == 4


def test_tokens_are_counted_like_the_server_does(server, tmp_path):
    config = JudgeConfig(
        kind="openai",
        model=server.model,
        base_url=server.base_url,
        max_reply_tokens=30,
        cache=tmp_path / "replies.sqlite",
    )
    client = make_llm_client(config)
    messages = [{"role": "user", "content": "hi"}]
    reply = client.complete(messages, schema={"type": "object"}, seed=0)
    assert reply.is_truncated
    assert (
        client.budget.spent[client.name].tokens == reply.num_tokens == 21 + 30
    )  # tokens of the prompt, as above, and of the reply
