"""The files of a run."""

import pytest

from salmonn.batch.ledger_files import LedgerFiles


@pytest.fixture
def files(tmp_path):
    """Names of the files of a run without shards."""
    return LedgerFiles(tmp_path / "captions.jsonl")
