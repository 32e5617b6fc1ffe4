"""The wheel and an editable install both find the recipes, the contracts and the demo's parts."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
FIND_ALL = """
from pear_data.demo import asset
from pear_data.resources import folder
assert (folder("pipelines") / "demo.yaml").is_file(), folder("pipelines")
assert (folder("schemas") / "views.sql").is_file(), folder("schemas")
assert (folder("schemas") / "manifest.schema.json").is_file(), folder("schemas")
assert asset("corpus").is_file()
assert (asset("initial") / "config.json").is_file() and (asset("behavior") / "config.json").is_file()
import pear_data; print(pear_data.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(CHECKOUT)], check=True, timeout=300)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_everything_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pear_data"}
    assert "pear_data/py.typed" in names
    pages = {f"pear_data/hooks/{page.name}" for page in (CHECKOUT / "pear_data" / "hooks").glob("*.md")}
    assert len(pages) >= 10
    assert pages <= set(names)
    weights = [info.file_size for info in zipfile.ZipFile(wheel).infolist() if "safetensors" in info.filename]
    assert len(weights) == 2
    assert sum(weights) < 5_000_000


def test_installed_from_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(
        [sys.executable, "-c", FIND_ALL],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path / "site"))


def test_installed_editable(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", FIND_ALL],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(CHECKOUT / "pear_data"))
