"""How timm is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

IN_ANOTHER_THREAD = """
import threading
from emotion.compat import _without_wandb
with _without_wandb():
    thread = threading.Thread(target=lambda: __import__("wandb"))
    thread.start()
    thread.join()
"""


@pytest.mark.parametrize("code", ["import wandb", IN_ANOTHER_THREAD])
def test_timm_does_not_import_wandb_and_a_tracker_does(tmp_path: Path, code: str) -> None:
    (tmp_path / "wandb.py").write_text("print('imported')\n")
    program = f"import sys, emotion.compat; print('wandb' in sys.modules)\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "False\nimported\n"), found.stderr
