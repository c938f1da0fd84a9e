"""`salmonn demo` from the command line: invalid flags, and passwords."""

import importlib.util
import shutil
import signal
import subprocess
import sys

import httpx
import pytest

from salmonn.caption.captioner import Captioner
from tests.launch import forked
from tests.limits import RUN_SECONDS, STEP_SECONDS
from tests.webui.conftest import start_demo


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "require passwords with --password-file, or allow everyone with --no-auth"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--max-seconds", "0"], "above 0"),
        (["--other-model", "m", "--model", "m"], "--other-model is the same as --model"),
        (["--references", "absent.jsonl"], "absent.jsonl"),
        (["--model", "{folder}"], "{folder}"),
        (["--reward-model", "{folder}"], "{folder} is not a reward model"),
        (["--judge.kind", "openai"], "needs the name of a model"),
    ],
)
def test_invalid_flags(call, tmp_path, flags, message):
    flags = [flag.format(folder=tmp_path) for flag in flags]
    code, _, err = call("demo", "--port", "0", "--votes", tmp_path / "votes", *flags)
    assert code == 2 and message.format(folder=tmp_path) in err and "Traceback" not in err


def test_reward_models_that_cannot_be_used(call, tmp_path, random_model, toy_reward, monkeypatch):
    """One of another base is refused once the models are loaded, one with an adapter before."""
    flags = ("demo", "--port", "0", "--votes", tmp_path / "votes", "--model", random_model, "--reward-model")
    code, _, err = call(*flags, toy_reward)
    *_, message = err.splitlines()  # the progress of loading is before it
    assert code == 2 and message.startswith(f"error: {toy_reward} was trained on toy, whose weights none of the models")
    assert "name that model with --model or --other-model" in message and "Traceback" not in err
    adapted = shutil.copytree(toy_reward, tmp_path / "adapted")
    (adapted / "adapter").mkdir()
    monkeypatch.setattr(Captioner, "load", lambda *_, **__: pytest.fail("no model must be loaded"))
    code, _, err = call(*flags, adapted)
    assert code == 2 and f"{adapted} has an adapter, which would change the captions of its base" in err


def test_missing_gradio_is_reported_before_models_are_loaded(call, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "gradio" else find_spec(name, *more)
    )
    code, _, err = call("demo", "--port", "0", "--votes", tmp_path / "votes", "--model", tmp_path)
    assert code == 2 and err == "error: salmonn demo needs Gradio: pip install 'salmonn[demo]'\n"


@pytest.mark.parametrize(("text", "message"), [("ann", "line 1: expected user:password"), ("\n", "has no accounts")])
def test_invalid_password_files(call, tmp_path, text, message):
    path = tmp_path / "passwords"
    path.write_text(text)
    code, _, err = call("demo", "--port", "0", "--votes", tmp_path / "votes", "--password-file", path)
    assert code == 2 and message in err


def test_port_0_is_a_free_port(demo):
    """Gradio's own choice would be among 7860 to 7959."""
    port = httpx.URL(demo.address).port
    assert port is not None and port not in range(7860, 7960)
    assert httpx.get(demo.address).status_code == 200


def test_nothing_is_shown_without_a_password(tmp_path):
    passwords = tmp_path / "passwords"
    passwords.write_text("ann:secret\n\nbob:pass:word\n")
    demo = start_demo(tmp_path / "demo", "--password-file", passwords)
    try:
        assert httpx.get(f"{demo.address}config").status_code == 401
        assert httpx.post(f"{demo.address}login", data={"username": "ann", "password": "wrong"}).status_code == 400
        with httpx.Client() as client:
            response = client.post(f"{demo.address}login", data={"username": "bob", "password": "pass:word"})
            assert response.status_code == 200 and client.get(f"{demo.address}config").status_code == 200
    finally:
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(STEP_SECONDS) == 0
    assert not list(demo.folder.glob("salmonn-*"))


def test_demo_app_is_the_same_command():
    command = forked(sys.executable, "demo/app.py", "--help")
    result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert result.returncode == 0 and "--other-model" in result.stdout
