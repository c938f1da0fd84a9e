"""Import modules of transformers that import torchvision, which is not installed, for what needs none of it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import transformers.video_processing_utils

assert transformers.video_processing_utils  # imported before, since it must not take the stub for torchvision
MODULES = (
    "torchvision",
    *(f"torchvision.{name}" for name in ("transforms", "transforms.v2", "transforms.v2.functional")),
)


@contextmanager
def torchvision_stub() -> Iterator[None]:
    """Put stubs in place of torchvision's modules."""
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in MODULES}):
        yield
