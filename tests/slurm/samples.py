"""Cluster files, sweep files and fake programs for the tests of the launcher."""

import json
from pathlib import Path
from typing import Any

from job.spec.model import JobSpec
from slurm.cluster import ClusterConfig
from tests.conftest import TINY

EXAMPLES = Path(__file__).parent.parent.parent / "slurm" / "examples"


def cluster_of(**values: Any) -> ClusterConfig:
    whole = {"time_limit_minutes": 60, "work": "/w", "runtime": "docker", "image": "job:1", "gpus": 0, **values}
    return ClusterConfig.model_validate_json(json.dumps(whole))


def spec_of(**values: Any) -> JobSpec:
    return JobSpec.model_validate({"name": "x", "data": {"source": "/deam"}, **values})


def sweep_file(folder: Path, **values: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(json.dumps({"name": "try", "spec": str(TINY), **values}), encoding="utf-8")
    return path


def add_program(folder: Path, name: str, text: str) -> None:
    """An executable shell script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    (folder / name).chmod(0o755)
