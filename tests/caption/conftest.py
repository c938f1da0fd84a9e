"""The engine's tests share the models and engines of the server's."""

from tests.serve.conftest import engine, model, own_engine, shared, shared_engine

__all__ = ["engine", "model", "own_engine", "shared", "shared_engine"]
