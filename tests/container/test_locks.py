"""The lock files fit their names, agree with one another, and name no machine and no index. `make lock` ends with these tests."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "container"
VARIANTS = ("cpu", "cuda")
OF_CUDA = ("nvidia-", "cuda-", "triton")
PINNED = re.compile(r"([A-Za-z0-9._-]+)(?:\[[\w,-]+\])?==([A-Za-z0-9.+!_-]+) \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(lock: str) -> dict[str, str]:
    """Package → version. Every package is pinned and has a hash; a lock has nothing else."""
    found: dict[str, str] = {}
    hashes = 1
    for number, line in enumerate(lock.splitlines(), 1):
        pinned = PINNED.fullmatch(line)
        if pinned:
            assert hashes, f"line {number}: the package before has no hash"
            found[canonical(pinned[1])], hashes = pinned[2], 0
        else:
            assert HASH.fullmatch(line), f"line {number}: {line!r} is neither a pinned package nor a hash"
            hashes += 1
    assert hashes, "the last package has no hash"
    return found


def refuse_mixed(cpu: dict[str, str], cuda: dict[str, str], constraints: dict[str, str]) -> None:
    """Raise AssertionError unless `cpu` has torch's CPU build and no CUDA, `cuda` has CUDA, and all other packages are equal."""
    assert cpu["torch"] == f"{constraints['torch']}+cpu"
    assert cuda["torch"] == constraints["torch"]
    assert [name for name in cpu if name.startswith(OF_CUDA)] == []
    assert "nvidia-cublas" in cuda
    assert {**cpu, "torch": ""} == {name: "" if name == "torch" else cuda[name] for name in cuda if not name.startswith(OF_CUDA)}
    assert {name for name in cpu if cpu[name] != constraints.get(name, cpu[name])} == {"torch"}


def locks() -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    cpu, cuda = (versions((FOLDER / f"lock-{variant}.txt").read_text()) for variant in VARIANTS)
    lines = (FOLDER / "constraints.txt").read_text().splitlines()
    return (cpu, cuda, {canonical(name): version for name, version in (line.split("==") for line in lines if "==" in line)})


def test_the_locks_of_cpu_and_cuda_agree_and_are_not_mixed_up() -> None:
    refuse_mixed(*locks())


def test_what_only_tests_need_is_not_in_the_image() -> None:
    extras = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    job, dev = ({canonical(re.split(r"[^\w.-]", one)[0]) for one in extras[extra]} for extra in ("job", "dev"))
    for variant in locks()[:2]:
        assert job <= {*variant}
        assert dev & {*variant} == set()


def test_the_packages_that_build_the_image_are_locked() -> None:
    assert set(versions((FOLDER / "lock-build.txt").read_text())) == {"pip", "setuptools"}


def test_the_tested_versions_in_the_image_are_those_of_the_constraints(tmp_path: Path) -> None:
    def written(constraints: Path) -> str:
        script = [sys.executable, "container/tested.py", str(constraints)]
        return subprocess.run(script, cwd=FOLDER.parent, capture_output=True, text=True, check=True).stdout

    assert written(FOLDER / "constraints.txt") == (FOLDER.parent / "job/machine/tested.py").read_text(), "`make lock` writes it"
    other = tmp_path / "constraints.txt"
    other.write_text((FOLDER / "constraints.txt").read_text().replace("\ntorch==", "\ntorch==9"))
    assert written(other) != written(FOLDER / "constraints.txt")


def test_locks_that_are_mixed_up_are_refused() -> None:
    cpu, cuda, constraints = locks()
    with pytest.raises(AssertionError):
        refuse_mixed(cuda, cpu, constraints)
    with pytest.raises(AssertionError):
        refuse_mixed(cpu, cpu, constraints)
    with pytest.raises(AssertionError):
        refuse_mixed(cpu, {**cuda, "torch": cpu["torch"]}, constraints)
    with pytest.raises(AssertionError):
        refuse_mixed({**cpu, "nvidia-cublas": "1"}, cuda, constraints)
    with pytest.raises(AssertionError):
        refuse_mixed({**cpu, "numpy": "1"}, {**cuda, "numpy": "1"}, constraints)


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://index.example/simple",
        "--find-links /opt/wheels",
        "torch @ file:///opt/wheels/torch.whl",
        "numpy==2.4.6",
        "numpy>=2 \\",
        "numpy==2.4.6 \\",
    ],
)
def test_a_lock_that_names_an_index_or_lacks_a_hash_is_refused(line: str) -> None:
    with pytest.raises(AssertionError):
        versions(f"{(FOLDER / 'lock-build.txt').read_text()}{line}\n")
