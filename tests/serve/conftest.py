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
from tests.serve.running import Gated, Running, wait_until


@pytest.fixture(scope="session")
def shared(random_model) -> Gated:
    """The random model, behind a gate."""
    return Gated(Captioner.load(random_model))


@pytest.fixture
def model(shared) -> Iterator[Gated]:
    """The shared model, its gate open before and after the test."""
    shared.gate.set()
    shared.fail = shared.fail_to_read = lambda size: None
    shared.batches.clear()
    shared.num_steps = shared.most = 0
    shared.stops_after = -1
    yield shared
    shared.gate.set()


@pytest.fixture(scope="module")
def shared_engine(shared) -> Iterator[Engine]:
    """Its workers end with the tests of a file: others count the processes that are left."""
    with ClipReader(workers=2) as reader:
        engine = Engine(shared, reader, max_waiting=12, max_seconds=60)
        yield engine
        engine.close(grace_seconds=5)


@pytest.fixture
def engine(shared_engine, model) -> Iterator[Engine]:
    """An engine that nobody asks before or after the test."""
    yield shared_engine
    model.gate.set()
    wait_until(lambda: not shared_engine.num_active)


@pytest.fixture
def own_engine(model) -> Iterator[Engine]:
    """An engine that a test may end."""
    with ClipReader(workers=1) as reader:
        engine = Engine(model, reader)
        yield engine
        engine.close(grace_seconds=0)


@pytest.fixture
def start(engine, videos, tmp_path) -> Iterator[Callable[..., Running]]:
    """Starts servers; in the end nothing of what was sent may be left."""
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    running: list[Running] = []
    settings = ServerConfig(
        name="toy",
        sources=MediaSources((videos[0].parent,), FetchPolicy(max_bytes=4 << 20)),
        limits=ChatLimits(40, max_tokens=500),
        request_seconds=120,
    )

    def start_(answering: Engine = engine, *, grace_seconds: float = 5.0, **changes) -> Running:
        service = Service(answering, replace(settings, **changes), uploads)
        running.append(Running(service, grace_seconds=grace_seconds))
        return running[-1]

    yield start_
    engine.captioner.gate.set()
    for one in running:
        wait_until(lambda one=one: not one.service.num_requests)
        one.stop()
    assert not list(uploads.iterdir())
