"""The command line of the launcher."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import TINY


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
