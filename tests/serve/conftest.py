"""A model, an engine with worker processes, and servers that share them."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from salmonn.caption.captioner import Captioner
from salmonn.caption.engine import Engine
from salmonn.caption.loader import ClipReader
from salmonn.serve.api import ServerConfig, Service
from salmonn.serve.fetch import FetchPolicy
from salmonn.serve.schema import ChatLimits
from salmonn.serve.sources import MediaSources
from tests.limits import wait_until
from tests.serve.running import GatedCaptioner, RunningServer


@pytest.fixture(scope="session")
def shared(random_model) -> GatedCaptioner:
    """The random model, behind a gate."""
    return GatedCaptioner(Captioner.load(random_model))


@pytest.fixture
def model(shared) -> Iterator[GatedCaptioner]:
    """The shared model, its gate open before and after the test."""
    shared.gate.set()
    shared.step_error = shared.prefill_error = lambda size: None
    shared.batches.clear()
    shared.num_steps = shared.largest_batch = 0
    shared.close_gate_at = -1
    yield shared
    shared.gate.set()


@pytest.fixture(scope="module")
def shared_engine(shared) -> Iterator[Engine]:
    """An engine for each test file: tests elsewhere count child processes, so its workers must end."""
    with ClipReader(workers=2) as reader:
        engine = Engine(shared, reader, max_waiting=12, max_seconds=60)
        yield engine
        engine.close(grace_seconds=5)


@pytest.fixture
def engine(shared_engine, model) -> Iterator[Engine]:
    """The shared engine, without requests before and after the test."""
    yield shared_engine
    model.gate.set()
    wait_until(lambda: not shared_engine.num_active)


@pytest.fixture
def own_engine(model) -> Iterator[Engine]:
    """An engine that the test may close."""
    with ClipReader(workers=1) as reader:
        engine = Engine(model, reader)
        yield engine
        engine.close(grace_seconds=0)


@pytest.fixture
def start(engine, videos, tmp_path) -> Iterator[Callable[..., RunningServer]]:
    """Start servers; after the test, no upload may be left."""
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    running: list[RunningServer] = []
    settings = ServerConfig(
        name="toy",
        sources=MediaSources((videos[0].parent,), FetchPolicy(max_bytes=4 << 20)),
        limits=ChatLimits(40, max_tokens=500),
        request_seconds=120,
    )

    def start_server(
        engine: Engine = engine, *, grace_seconds: float = 5.0, certificate=None, **changes
    ) -> RunningServer:
        service = Service(engine, replace(settings, **changes), uploads)
        running.append(RunningServer(service, grace_seconds=grace_seconds, certificate=certificate))
        return running[-1]

    yield start_server
    engine.captioner.gate.set()
    for server in running:
        wait_until(lambda server=server: not server.service.num_requests)
        server.stop()
    assert not [path for path in uploads.rglob("*") if path != uploads / "files"]
