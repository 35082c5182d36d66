"""Every dependency is named with its reason in tests/README.md, and a login node gets few of them."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.container.engines import fetch

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAX_LAUNCHER_BYTES = 30_000_000
NOT_COUNTED = ("pip", "setuptools", "pkg_resources", "_distutils_hack")


def canonical(requirement: str) -> str:
    """`types-PyYAML[x]>=1,<2` → `types-pyyaml`."""
    (name,) = re.findall(r"^[A-Za-z0-9._-]*[A-Za-z0-9]", requirement)
    return re.sub(r"[-_.]+", "-", name).lower()


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table in tests/README.md whose first heading this is."""
    text = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    (table,) = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]


def test_every_python_package_has_a_row_with_its_extra_and_a_reason() -> None:
    wanted = {("", canonical(one)) for one in PROJECT["dependencies"]}
    wanted |= {(extra, canonical(one)) for extra, some in PROJECT["optional-dependencies"].items() for one in some}
    rows = rows_of("Python package")
    named = [(extra, canonical(name)) for names, extra, _ in rows for name in names.split(", ")]
    assert sorted(named) == sorted(wanted)
    assert all(reason for _, _, reason in rows)


def test_every_debian_package_of_continuous_integration_has_a_row() -> None:
    lists = re.findall(r"^packages\+?=\((.*)\)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    named = [name for names, _ in rows_of("Debian package") for name in names.split(", ")]
    assert sorted(named) == sorted(" ".join(lists).split())


def launcher_bytes(folder: Path) -> int:
    """What is installed, without pip and setuptools, which a virtual environment may bring."""
    counted = [path for path in folder.iterdir() if path.name.split("-")[0] not in NOT_COUNTED]
    files = (file for path in counted for file in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files if file.is_file())


@pytest.mark.full
def test_the_launcher_takes_less_than_30_megabytes(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("emotion", "job", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    constraint = ["--constraint", ROOT / "container/constraints.txt"]
    fetch([sys.executable, "-m", "pip", "install", "--quiet", *constraint, "--target", site, f"{source}[slurm]"], "the launcher")
    size = launcher_bytes(site)
    assert 1_000_000 < size < MAX_LAUNCHER_BYTES
    # It is the launcher, and starts from there alone.
    command = [sys.executable, "-ISc", f"import sys; sys.path.insert(0, {str(site)!r}); from slurm.__main__ import main; main()"]
    found = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "submit" in found.stdout
    assert not (site / "torch").exists()
