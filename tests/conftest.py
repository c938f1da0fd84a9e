"""Order of the tests, the fork server, and the fixtures, which the controller of pytest-xdist does not import."""

import gc
import os
import sys

# Bitwise comparisons need one device and one order of sums: tests run on one CPU thread.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported: the fork server may have no threads

import pytest

from tests.launch import SHARED_SOCKET, socket_path

# The slowest files run first, so that no worker has one of them at the end.
LONGEST = (
    "tests/test_docs.py", "tests/webui/test_app.py", "tests/recipes/test_mrdpo.py", "tests/test_config.py",
    "tests/batch/test_caption_cli.py", "tests/recipes/test_reward.py", "tests/train/test_parallel.py",
    "tests/test_published_cli.py", "tests/serve/test_server_captions.py", "tests/webui/test_answers.py",
    "tests/recipes/test_server_sampling.py", "tests/recipes/test_families.py", "tests/test_cli.py",
    "tests/batch/test_caption_cli_output.py", "tests/recipes/test_sft.py", "tests/train/test_dry_run.py",
    "tests/train/test_options.py", "tests/caption/test_worker.py", "tests/serve/test_api.py", "tests/test_dist.py",
    "tests/tools/test_ablation.py", "tests/train/test_server_sampling.py", "tests/train/test_sampling.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, or start the fork server of all workers of pytest-xdist, which load them."""
    if config.getoption("numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[SHARED_SOCKET] = str(socket_path())
    else:
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the longest files to the front."""
    order = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


def pytest_collection_finish() -> None:
    """Exempt what the test modules have imported from garbage collection, too."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the differences from other code that tests have found (`make exactness`), if output is not captured."""
    exactness = sys.modules.get("tests.exactness")  # imported by the tests that measure
    if exactness and exactness.FOUND and config.getoption("capture") == "no":
        terminalreporter.write_line("")
        for line in exactness.exactness_table():
            terminalreporter.write_line(line)
