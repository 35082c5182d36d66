"""The command line of the launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.sweep_folder import JobRecord, Submission
from tests.conftest import TINY
from tests.slurm.conftest import ROOT, LoginNode


def test_the_launcher_starts_without_torch_and_reports_a_missing_slurm_in_one_line(tmp_path: Path) -> None:
    blocked = ("torch", "numpy", "scipy", "librosa", "timm", "boto3", "tqdm")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\nfrom slurm.__main__ import main; sys.exit(main())"
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"{{time_limit_minutes: 9, work: {tmp_path}, runtime: docker, image: x}}", encoding="utf-8")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"{{name: x, spec: {TINY}}}", encoding="utf-8")
    nowhere = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, "-c", code, "submit", str(sweep), "--cluster", str(cluster)]
    found = subprocess.run(command, capture_output=True, text=True, env=nowhere, check=False)
    assert found.returncode == 64
    assert found.stderr == (
        "emotion-slurm: scontrol is not in PATH: this is not a machine of a SLURM cluster. Log in to one, or load its module.\n"
    )


def launcher(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slurm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_a_script_is_utf8_whatever_the_terminal_shows(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{time_limit_minutes: 9, work: /☂, runtime: docker, image: x}", encoding="utf-8")
    found = launcher("script", TINY, "--cluster", cluster, PYTHONIOENCODING="latin-1")
    assert (found.returncode, found.stderr) == (0, "")
    assert "work='/☂'" in found.stdout


@pytest.mark.parametrize(
    ("program", "warning"),
    [
        ("runtime: bare, python: /no/python", "python: there is no /no/python; name the Python that this package is installed"),
        ("runtime: apptainer, image: /no.sif", "image: there is no /no.sif; build it, or correct the path, unless the nodes"),
        (f"runtime: bare, python: {sys.executable}", ""),
    ],
)
def test_a_script_whose_program_is_not_on_this_machine_has_a_warning(tmp_path: Path, program: str, warning: str) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"{{time_limit_minutes: 9, work: /x, {program}}}", encoding="utf-8")
    found = launcher("script", TINY, "--cluster", cluster)
    assert found.returncode == 0
    assert found.stdout.startswith("#!/")
    assert found.stderr.startswith(f"emotion-slurm: warning: {warning}" if warning else "")
    assert found.stderr.count("\n") == bool(warning)


def test_a_value_may_come_from_the_environment_of_the_launcher(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{time_limit_minutes: 9, work: /x, runtime: docker, image: x}", encoding="utf-8")
    given = launcher("script", TINY, "--cluster", cluster, "--set", "seed=7")
    assert (given.returncode, given.stderr) == (0, "")
    assert launcher("script", TINY, "--cluster", cluster, "--set", "seed=$SEED", SEED="7").stdout == given.stdout
    missing = launcher("script", TINY, "--cluster", cluster, "--set", "seed=$SEED_OF_NOBODY")
    assert (missing.returncode, missing.stdout) == (64, "")
    assert "the environment has no SEED_OF_NOBODY" in missing.stderr


def test_an_error_that_nobody_expected_is_one_line(tmp_path: Path) -> None:
    code = "import sys; from slurm.__main__ import Path, main; Path.open = Path.read_bytes = None; sys.exit(main())"
    command = [sys.executable, "-c", code, "script", str(TINY), "--cluster", str(TINY)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 70
    assert found.stderr.startswith("emotion-slurm: an unexpected error, TypeError at ")
    assert found.stderr.count("\n") == 1


def test_logs_escapes_names_that_a_terminal_cannot_show_and_says_so_where_there_is_nothing(login: LoginNode) -> None:
    folder = login.folder(login.sweep(0))
    log = folder.log_path("11")
    log.parent.mkdir()
    log.write_text("ü☃\n", encoding="utf-8")
    folder.write_submission(Submission(1, (JobRecord("task", 0, "11"),)))
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    argv = [sys.executable, "-m", "slurm", "logs", str(folder.path), "0"]
    found = subprocess.run(argv, capture_output=True, encoding="latin-1", cwd=ROOT, env=environment, check=False)
    assert (found.returncode, found.stdout) == (0, "ü\\u2603\n")
    log.unlink()
    found = subprocess.run(argv, capture_output=True, encoding="latin-1", cwd=ROOT, env=environment, check=False)
    said = "nothing is written yet; `emotion-slurm status` says what the jobs wait for\n"
    assert (found.returncode, found.stdout, found.stderr) == (0, "", said)


def test_submit_names_the_variables_that_it_does_not_use(login: LoginNode) -> None:
    folder = login.folder(login.sweep(0))
    login.patch.setenv("SBATCH_ACCOUNT", "x")
    found = subprocess.run(
        [sys.executable, "-m", "slurm", "resubmit", str(folder.path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "not used, as the cluster file says what jobs may use: SBATCH_ACCOUNT" in found.stderr


def test_doctor_prints_json_also_where_something_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/sh\ncase "$*" in *partition) echo "PartitionName=gpu State=DOWN" ;; esac\n')
    (tmp_path / "scontrol").chmod(0o755)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        f"{{time_limit_minutes: 9, work: {tmp_path}, partition: gpu, runtime: docker, image: x}}", encoding="utf-8"
    )
    found = launcher("doctor", "--cluster", cluster, "--json", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert found.returncode == 64
    printed = json.loads(found.stdout)
    assert printed["report"]["site"].endswith("partition gpu")
    assert any("gpu is DOWN" in problem for problem in printed["problems"])
