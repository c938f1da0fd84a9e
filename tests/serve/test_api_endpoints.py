"""What the server has beside answers: models, health, its schema and reference, CORS, metrics, the log and TLS."""

import json
import logging
import ssl
import subprocess

import httpx2
import openai
import pytest

from salmonn import __version__
from tests.limits import wait_until
from tests.score.browser import needs_browser, start_browser
from tests.serve.running import chat, data_url, read_metrics


def test_models_and_health(start):
    running = start()
    assert [model.id for model in running.client().models.list()] == ["toy"]
    health = httpx2.get(f"{running.url}/health", trust_env=False)
    assert health.status_code == 200 and health.json()["status"] == "ok" and health.json()["model"] == "toy"
    assert httpx2.head(f"{running.url}/health", trust_env=False).status_code == 200
    assert httpx2.get(f"{running.url}/ping", trust_env=False).json() == health.json()
    assert httpx2.get(f"{running.url}/version", trust_env=False).json() == {"version": __version__}


def test_a_model_is_looked_up_by_name(start):
    client = start(name="team/toy").client()
    assert client.models.retrieve("team/toy").id == "team/toy"
    with pytest.raises(openai.NotFoundError, match="model 'other' not found; available: team/toy") as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_the_openapi_schema_describes_the_parameters(start):
    schema = httpx2.get(f"{start().url}/openapi.json", trust_env=False).json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["messages"] and {"temperature", "stop", "modality"} <= body["properties"].keys()
    names = json.dumps(schema).split("#/components/schemas/")[1:]
    assert {name.split('"')[0] for name in names} <= schema["components"]["schemas"].keys()


@needs_browser
def test_the_reference_asks_the_network_for_nothing(start):
    """In Chromium: one request, no error, every path, and the parameters of a completion; no key is needed."""
    running = start(keys=("a key of 16 chars",))
    requests, errors = [], []
    with start_browser() as browser:
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{running.url}/docs")
        text = page.inner_text("body")
        font = page.evaluate("getComputedStyle(document.body).fontFamily")
    assert requests == [f"{running.url}/docs"] and not errors
    schema = httpx2.get(f"{running.url}/openapi.json", trust_env=False).json()
    assert all(f"{path}\n" in text for path in schema["paths"]) and "/v1/files/{file_id}" in text
    assert "repetition_penalty" in text and "number, at least 0.1, at most 10" in text
    assert "system-ui" in font  # the policy of the page allows its style


def test_pages_of_allowed_origins_may_use_the_server(start):
    url = start(origins=("https://page.example",), keys=("a key of 16 chars",)).url

    def preflight(origin):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        headers["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
        return httpx2.options(f"{url}/v1/chat/completions", headers=headers, trust_env=False)

    allowed = preflight("https://page.example")
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://page.example"
    refused = preflight("https://evil.example")
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
    answer = httpx2.get(f"{url}/v1/models", headers={"Origin": "https://page.example"}, trust_env=False)
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "https://page.example"


def test_unknown_paths_are_errors(start):
    response = httpx2.get(f"{start().url}/v1/embeddings", trust_env=False)
    assert response.status_code == 404 and response.json()["error"]["type"] == "not_found_error"


def test_metrics_and_log(start, videos, caplog):
    """Two answers, one rejection: outcomes, bytes and tokens; the log has a line for each, without texts."""
    running = start()
    client = running.client()
    with caplog.at_level(logging.INFO, logger="salmonn.serve"):
        answers = [chat(client, data_url(videos[0]), "A secret?"), chat(client, videos[1].name)]
        with pytest.raises(openai.BadRequestError):
            chat(client, "data:;base64,AAAA", "A secret?")
        wait_until(lambda: running.service.num_requests == 0)
    metrics = read_metrics(running)
    assert metrics["salmonn_requests_totalanswered"] == 2 and metrics["salmonn_requests_totalrejected"] == 1
    assert metrics["salmonn_tokens_totalprompt"] == sum(answer.usage.prompt_tokens for answer in answers)
    assert metrics["salmonn_tokens_totalcompletion"] == sum(answer.usage.completion_tokens for answer in answers)
    assert metrics["salmonn_received_bytes_totalupload"] == videos[0].stat().st_size + 3
    assert metrics["salmonn_time_to_first_token_seconds_count"] == 2 and metrics["salmonn_request_seconds_count"] == 3
    assert metrics["salmonn_reading_seconds_count"] == 3 and metrics["salmonn_requests_active"] == 0
    lines = [record.getMessage() for record in caplog.records if record.name == "salmonn.serve.request"]
    assert [line.split()[1] for line in lines] == ["answered", "answered", "rejected"]
    assert [line.split()[0] for line in lines[:2]] == [answer.id for answer in answers]
    assert answers[0]._request_id == answers[0].id
    assert not any("secret" in line or videos[1].name in line for line in lines)


def test_https(start, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*line.split(), *names], check=True, capture_output=True)
    url = f"https://127.0.0.1:{start(certificate=(certificate, key)).port}/health"
    tls = ssl.create_default_context(cafile=certificate)
    assert httpx2.get(url, verify=tls, trust_env=False).json()["status"] == "ok"
