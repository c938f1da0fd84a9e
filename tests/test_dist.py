"""Processes of one run, launched for real by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from salmonn import dist

SCRIPT = """
import json, sys
from pathlib import Path
from salmonn import dist

dist.setup(threads=1)
result = {"rank": dist.rank(), "size": dist.world_size(), "main": dist.is_main()}
result["total"] = dist.total(dist.rank() + 1.5)
for count in (0, 1, 4, 5):
    mine = dist.share(list(range(count)))
    result[f"mine {count}"] = mine
    result[f"all {count}"] = dist.gather([item * 10 for item in mine])
result["text"] = dist.gather([f"of {dist.rank()}"])
dist.barrier()
Path(sys.argv[1], f"{dist.rank()}.json").write_text(json.dumps(result))
"""


def test_two_processes_share_and_gather(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = Path(sys.executable).with_name("torchrun")
    subprocess.run(
        [torchrun, "--standalone", "--nproc_per_node=2", script, tmp_path],
        check=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first["rank"], first["size"], first["main"]) == (0, 2, True)
    assert (second["rank"], second["size"], second["main"]) == (1, 2, False)
    assert first["mine 5"] == [0, 2, 4] and second["mine 5"] == [1, 3]
    assert first["mine 1"] == [0] and second["mine 1"] == []
    for result in (first, second):
        assert result["all 0"] == [] and result["all 1"] == [0]
        assert result["all 4"] == [0, 10, 20, 30] and result["all 5"] == [0, 10, 20, 30, 40]
        assert result["text"] == ["of 0", "of 1"] and result["total"] == 4.0  # 1.5 + 2.5


def test_without_a_launcher_it_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert dist.share("abc") == dist.gather("abc") == ["a", "b", "c"]
    assert dist.total(2.5) == 2.5
    dist.barrier()


@pytest.mark.parametrize(("rank", "expected"), [("0", ["a", "d"]), ("1", ["b", "e"]), ("2", ["c"])])
def test_shares_of_three(monkeypatch, rank, expected):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", rank)
    assert dist.share("abcde") == expected
