import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from emotion.audio.partition import Partition, TestSongs, TrainingSongs, ValidationSongs
def build(training: TrainingSongs, validation: ValidationSongs, test: TestSongs) -> Partition:
    return Partition(training, {second}, {third}, training_groups=[], validation_groups=[], test_groups=[])
"""


@pytest.mark.full
def test_a_partition_with_validation_and_test_swapped_does_not_type_check(tmp_path: Path) -> None:
    for name, second, third in (("right", "validation", "test"), ("swapped", "test", "validation")):
        (tmp_path / f"{name}.py").write_text(PROGRAM.format(second=second, third=third))
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path / "cache"]
    found = subprocess.run(
        [*command, tmp_path / "right.py", tmp_path / "swapped.py"], capture_output=True, text=True, check=False
    )
    errors = [line for line in found.stdout.splitlines() if ": error: " in line]
    assert [Path(line.partition(":")[0]).name for line in errors] == ["swapped.py"] * 2, found.stdout + found.stderr
    assert all("arg-type" in line for line in errors)
