"""The package: its data files, its license, and a wheel that contains all of them."""

import os
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.limits import RUN_SECONDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DATA = sorted(
    path.relative_to(ROOT / "salmonn").as_posix()
    for path in (ROOT / "salmonn").rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc")
)


def test_data_files_are_packaged():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["salmonn"]
    assert "tiny/model.safetensors" in DATA
    assert [name for name in DATA if not any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_license_is_that_of_the_project():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "license: Apache-2.0" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_wheel_contains_all_files(tmp_path):
    command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True, timeout=RUN_SECONDS)
    (wheel,) = tmp_path.glob("salmonn-*.whl")
    with ZipFile(wheel) as file:
        names = set(file.namelist())
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "salmonn").rglob("*.py")}
    assert code | {f"salmonn/{name}" for name in DATA} <= names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")
def test_docker_image(tmp_path):
    tag = "salmonn-test"
    subprocess.run(["docker", "build", "--tag", tag, str(ROOT)], check=True, timeout=RUN_SECONDS)
    command = ["docker", "run", "--rm", tag, "--version"]
    assert "salmonn" in subprocess.run(command, check=True, capture_output=True, text=True, timeout=RUN_SECONDS).stdout


@pytest.mark.parametrize(("target", "index"), [("image", "whl/cpu"), ("image-cuda", "whl/cu130")])
def test_images_are_built_where_docker_runs(tmp_path, target, index):
    """With a stand-in for docker: what is built and started; where docker does not run, a sentence and no failure."""
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
    docker.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    make = ["make", "--silent", target]
    subprocess.run(make, cwd=ROOT, env=environment, check=True)
    _, build, run = (tmp_path / "calls").read_text().splitlines()
    assert build.startswith("build --tag salmonn") and index in build and "TORCH=torch==" in build
    assert run.startswith("run --rm salmonn") and run.endswith("--version")
    docker.write_text("#!/bin/sh\nexit 1\n")
    result = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "no image was built" in result.stdout
