"""The engine's tests share the models and engines of the server's; those of reading share a scripted module."""

import sys

import pytest

from salmonn.media.frame_sampling import FixedRateSampler
from tests.serve.conftest import engine, model, own_engine, shared, shared_engine

__all__ = ["engine", "model", "own_engine", "shared", "shared_engine"]


@pytest.fixture
def scripted(request, tmp_path, monkeypatch):
    """A read spec of the test file's `SCRIPTED_MODULE`, which worker processes can import."""
    (tmp_path / "scripted.py").write_text(request.module.SCRIPTED_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import scripted

    yield scripted.ScriptedReadSpec(FixedRateSampler())
    del sys.modules["scripted"]
