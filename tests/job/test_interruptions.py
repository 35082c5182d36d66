"""However the tiny job is interrupted, it ends with the bytes of an unbroken run. Where it is struck: see the driver."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job.pipeline.folders import JobFolders
from job.pipeline.phases import BY_NAME
from job.spec.load import load_spec
from tests.conftest import TINY, TinyRun, run_stopped_in_each_phase, terminated_in_gan
from tests.job.soak import promised_bytes, soak

DRIVER = Path(__file__).with_name("interruption_driver.py")
CASES = dict.fromkeys(BY_NAME, 1) | {
    "stage": 3,
    "features": 3,
    "gan": 1 + 5,
    "synth": 1 + 2,
    "quality": 3,
    "vit": 1 + 7 + 6,
    "stack": 2 + 2 + 2,
    "evaluate": 2 + 2 + 2,
    "publish": 1 + 2 + 2,
}
"""Phase → fewest interruptions: before it starts, then at each step, batch, song or baseline where these are few."""
KILLED_UNSAVED = CASES | {"gan": 1 + 2, "vit": 1 + 2 + 2}
"""The same where a training has saved nothing: the middle and the last of the steps, and of the batches of a validation."""
NEVER_SECONDS, ALWAYS_SECONDS = 3600, 0
"""Between checkpoints: none but those of a stop, and one after every step."""

Sweep = Callable[..., int]


@pytest.fixture(scope="module")
def sweep(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    """sweep(manner=…, phase=…, …) runs what interruption_driver.Sweep says and returns the number of cases, all of them good."""
    command = [sys.executable, DRIVER, tiny_run.work, tmp_path_factory.mktemp("interruptions")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None

        def ask(**sweep: object) -> int:
            driver.stdin.write(json.dumps(sweep) + "\n")
            driver.stdin.flush()
            answer = driver.stdout.readline()
            assert answer, f"{sweep}: the driver ended; what was wrong stands above"
            found = json.loads(answer)
            assert found["broken"] == []
            return found["cases"]

        yield ask
        driver.kill()


@pytest.mark.full
def test_a_job_stopped_in_each_phase_and_run_again_publishes_the_same_bytes(tiny_run: TinyRun, tmp_path: Path) -> None:
    folders = JobFolders(tmp_path, tiny_run.work / "scratch")
    published = run_stopped_in_each_phase(load_spec(TINY), folders)
    assert promised_bytes(published) == promised_bytes(tiny_run.published)


@pytest.mark.full
def test_a_signal_ends_the_job_with_75_and_the_same_command_resumes(
    tiny_run: TinyRun, emotion_job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    scratch = tiny_run.work / "scratch"
    command = [sys.executable, "-m", "job", "run", str(TINY), "--work", str(tmp_path), "--scratch", str(scratch)]
    code, rest = terminated_in_gan(command)
    assert code == 75, rest
    assert "Traceback" not in rest
    found = emotion_job("run", TINY, "--work", tmp_path, "--scratch", scratch)
    assert found.returncode == 0, found.stderr
    (published,) = (tmp_path / "published").iterdir()
    assert promised_bytes(published) == promised_bytes(tiny_run.published)
    events = [json.loads(line) for line in next(tmp_path.glob("tiny-*/attempts.jsonl")).read_text().splitlines()]
    assert [event.get("reason") for event in events] == [None, "Interrupted", None, "done"]


@pytest.mark.full
@pytest.mark.parametrize("manner", ["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("phase", CASES)
def test_a_phase_interrupted_wherever_it_checks_for_a_stop_leaves_the_same_outputs(phase: str, manner: str, sweep: Sweep) -> None:
    """A training that is killed has saved nothing and restarts; see below for one that saves at every step."""
    fewest = KILLED_UNSAVED if manner == "SIGKILL" else CASES
    assert sweep(manner=manner, phase=phase, checkpoint_seconds=NEVER_SECONDS) >= fewest[phase]


@pytest.mark.full
@pytest.mark.parametrize("phase", ["gan", "vit"])
def test_a_training_killed_while_it_saves_leaves_the_same_outputs(phase: str, sweep: Sweep) -> None:
    assert sweep(manner="SIGKILL", phase=phase, checkpoint_seconds=ALWAYS_SECONDS, late_ms=4) >= CASES[phase]


@pytest.mark.full
@pytest.mark.parametrize("manner", ["asked", "SIGTERM", "SIGKILL"])
def test_a_job_interrupted_in_each_phase_publishes_the_same_bytes(manner: str, sweep: Sweep) -> None:
    assert sweep(manner=manner, phase=None, checkpoint_seconds=ALWAYS_SECONDS) == 1


@pytest.mark.full
def test_a_job_ended_at_random_moments_publishes_the_same_bytes(tiny_run: TinyRun, tmp_path: Path) -> None:
    killed = stopped = seed = 0
    # What a round meets depends on how fast the machine is.
    while not (killed and stopped):
        seed += 1
        folder = tmp_path / str(seed)
        folder.mkdir()
        found = soak(TINY, tiny_run.published, folder, seed, longest_seconds=tiny_run.seconds, most=6)
        killed, stopped = killed + found.killed, stopped + found.stopped
