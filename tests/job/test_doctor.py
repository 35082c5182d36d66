"""`emotion-job doctor` and the checks of `run` before any work: each wrong case is made for real."""

import errno
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from emotion.errors import AccessError, DataError, EmotionError, NodeError, SpecError, StorageError
from job.machine.check import Check, wrong
from job.machine.device import check_device
from job.machine.disk import check_disk, disk_failure, require_writable, try_to_write
from job.machine.doctor import exit_code_of
from job.machine.software import prepare
from job.machine.stores import check_stores
from job.spec.load import load_spec
from tests.conftest import TINY
from tests.stores.scripted import ScriptedS3, error, with_headers
from tests.stores.servers import S3Server, free_port, moto_server

Command = Callable[..., subprocess.CompletedProcess[str]]
KEY, SECRET, TOKEN = "AKIAWRONGWRONGWRONG1", "wrong/Secret+Key0123456789abcdefghijklmno", "a-token-of-a-session-4711"
NOBODY = 65534
WITHOUT_TORCH = """
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
"""
OURS = {"PYTORCH_ALLOC_CONF": "", "PYTORCH_CUDA_ALLOC_CONF": ""}


def by_name(found: str) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(found)["checks"]}


# The command


def test_a_machine_without_a_fault_gives_ok_and_0_and_nothing_is_left_behind(emotion_job: Command, tmp_path: Path) -> None:
    found = emotion_job("doctor", TINY, "--work", tmp_path, "--scratch", tmp_path / "not" / "there", "--json", **OURS)
    assert found.returncode == 0, found.stdout
    checks = by_name(found.stdout)
    assert [*checks] == ["spec", "device", "allocator", "versions", "work", "scratch", "data.source"]
    assert "it computes a small product" in checks["device"]["found"]
    assert checks["allocator"]["found"].startswith("expandable_segments:True, ")
    assert f"not there yet, in {tmp_path}" in checks["scratch"]["found"]
    assert [*tmp_path.iterdir()] == []


def test_a_folder_of_work_in_the_dataset_is_wrong_as_for_run(emotion_job: Command, tmp_path: Path) -> None:
    found = emotion_job("doctor", TINY, "--work", tmp_path / "work", "--set", f"data.source={tmp_path}", "--json", **OURS)
    check = by_name(found.stdout)["folders"]
    assert (check["status"], check["exit_code"]) == ("wrong", 64)
    assert check["found"] == f"--work: {tmp_path}/work lies inside data.source {tmp_path}"
    assert found.returncode == 64


def test_all_errors_of_a_machine_are_lines_and_no_secret_is_in_them(
    emotion_job: Command, tmp_path: Path, store: ScriptedS3
) -> None:
    """The server repeats what it was sent, as a debugging proxy does."""
    store.on("*", "*", error(403, "InvalidAccessKeyId", f"no {KEY} {SECRET} {TOKEN}"), times=math.inf)
    credentials = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN}
    allocator = {**OURS, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:maybe"}
    places = ["--set", "data.source=s3://bucket/deam", "--set", "vit.weights=/no/such.pt", "--set", endpoint(store)]
    arguments = ("doctor", TINY, "--work", tmp_path, *places)
    found = emotion_job(*arguments, **{**store.address.environment(), **credentials, **allocator})
    assert found.returncode == 64, found.stdout + found.stderr
    lines = {line.split()[1]: line for line in found.stdout.splitlines()}
    assert [name for name, line in lines.items() if line.startswith("wrong ")] == ["allocator", "data.source", "vit.weights"]
    assert "expandable_segments is 'maybe', expected True or False. Correct or unset" in lines["allocator"]
    assert lines["device"].startswith("warn  device")
    assert "s3://bucket/deam as AWS_ACCESS_KEY_ID: storage: s3:ListBucket" in lines["data.source"]
    assert "check access key, secret and token" in lines["data.source"]
    as_json = emotion_job(*arguments, "--json", **{**store.address.environment(), **credentials, **allocator})
    assert as_json.returncode == 64
    assert by_name(as_json.stdout)["data.source"]["exit_code"] == 77
    for secret in (SECRET, TOKEN):
        assert secret not in found.stdout + found.stderr + as_json.stdout + as_json.stderr


def test_without_torch_and_with_a_wrong_spec_the_rest_of_the_machine_is_examined(emotion_job: Command, tmp_path: Path) -> None:
    arguments = ["emotion-job", "doctor", str(TINY), "--work", str(tmp_path), "--set", "gan.epochs=ten"]
    code = f"{WITHOUT_TORCH}import sys; sys.argv = {arguments}; from job.__main__ import main; main()"
    environment = {**os.environ, **OURS, "PYTORCH_ALLOC_CONF": "expandable_segments:False"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 64, found.stderr
    lines = found.stdout.splitlines()
    assert "gan.epochs" in lines[0]
    assert lines[1].startswith("warn  device                torch is not installed here, so nothing was computed")
    assert lines[2].startswith("warn  allocator             expandable_segments:False: ")
    assert "Unset PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF" in lines[2]


def test_a_number_of_threads_that_is_none_is_wrong_unless_the_spec_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "zero")
    check = prepare(None)
    assert check is not None
    assert (check.name, check.status, check.exit_code) == ("threads", "wrong", 64)
    assert check.found.startswith("OMP_NUM_THREADS is 'zero'")


def test_the_worst_of_several_errors_is_the_exit_code() -> None:
    kinds: list[type[EmotionError]] = [StorageError, AccessError, DataError, SpecError, NodeError]
    checks = [Check("versions", "warn", "old", "Use our image.")]
    assert exit_code_of(checks) == 0
    for kind, code in zip(kinds, (69, 77, 65, 64, 71), strict=True):
        checks.append(wrong("x", kind("It is wrong. Correct it.")))
        assert exit_code_of(checks) == code
    assert checks[-1].line() == "wrong x                     It is wrong. Correct it."


# The device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_described_with_its_driver_memory_and_compute_capability() -> None:
    check, in_force = check_device(load_spec(TINY, ["device.kind=cuda"]).device, "auto")
    assert check.status in ("ok", "warn")
    assert re.search(r"driver \d+\.[\d.]+, CUDA \d+\.\d+, compute capability \d+\.\d, [\d.]+ of [\d.]+ GiB free", check.found)
    assert in_force is not None


# Disks


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EIO, NodeError),
        (errno.ESTALE, NodeError),
        (errno.ENOSPC, StorageError),
        (errno.EDQUOT, StorageError),
        (errno.EACCES, AccessError),
    ],
)
def test_a_broken_disk_is_the_nodes_fault_and_a_full_one_is_not(number: int, kind: type[Exception]) -> None:
    found = disk_failure(OSError(number, os.strerror(number), "/work/x"))
    assert type(found) is kind
    assert os.strerror(number) in str(found)
    assert ("another node" in str(found)) == (kind is NodeError)


def test_a_folder_that_can_be_used_is_left_as_it_was(tmp_path: Path) -> None:
    require_writable(tmp_path, tmp_path, tmp_path / "absent")
    assert [*tmp_path.iterdir()] == []


def test_memory_is_no_place_for_results() -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm")
    assert check_disk("work", Path("/dev/shm/emotion"), must_survive=True).status == "warn"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which needs root")
def test_a_folder_of_somebody_else_is_a_matter_of_access() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        child = os.fork()
        if child == 0:
            os.setuid(NOBODY)
            found = check_disk("work", Path(name) / "runs")
            os._exit(found.exit_code if "Permission denied" in found.found and found.remedy else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77


@pytest.mark.full
def test_a_full_disk_is_wrong_and_a_small_one_a_warning(tmp_path: Path, mounted: Callable[..., None]) -> None:
    mounted(tmp_path, "-t", "tmpfs", "-o", "size=1m", "none")
    few = check_disk("scratch", tmp_path)
    assert (few.status, "room for 0.0 GiB" in few.found) == ("warn", True)
    with pytest.raises(OSError, match="No space left"):
        (tmp_path / "songs").write_bytes(bytes(2 << 20))
    full = check_disk("scratch", tmp_path)
    assert (full.status, full.exit_code) == ("wrong", 69)
    assert "No space left on device" in full.found
    assert "name another folder for scratch" in full.remedy


@pytest.mark.full
def test_a_disk_that_was_mounted_read_only_ends_run_and_doctor_with_71(
    emotion_job: Command, tmp_path: Path, mounted: Callable[..., None]
) -> None:
    mounted(tmp_path, "-t", "tmpfs", "-o", "ro", "none")
    with pytest.raises(NodeError, match="Read-only file system"):
        try_to_write(tmp_path)
    found = emotion_job("run", TINY, "--work", tmp_path)
    assert found.returncode == 71, found.stderr
    assert re.fullmatch(rf"emotion-job: {tmp_path}: Read-only file system\. Run the job on another node, .*\n", found.stderr)
    found = emotion_job("doctor", "--work", tmp_path)
    assert found.returncode == 71
    assert f"wrong work                  {tmp_path}: Read-only file system. Run the job on another node" in found.stdout


# Storage and the clock


def endpoint(server: ScriptedS3) -> str:
    return f"storage.endpoint_url={server.address.endpoint_url}"


def stores(*settings: str) -> dict[str, Check]:
    return {check.name: check for check in check_stores(load_spec(TINY, settings))}


def test_every_place_of_a_spec_is_looked_at(store: ScriptedS3, tmp_path: Path) -> None:
    places = (
        "artifacts.destination=s3://bucket/published",
        f"checkpoint.mirror={tmp_path}",
        "vit.weights=s3://bucket/deam/big.bin",
    )
    found = stores("data.source=s3://bucket/deam", *places, endpoint(store))
    assert {name: check.status for name, check in found.items()} == {
        "data.source": "ok",
        "artifacts.destination": "ok",
        "checkpoint.mirror": "warn" if found["checkpoint.mirror"].status == "warn" else "ok",  # a small disk
        "vit.weights": "ok",
        "clock": "ok",
    }
    assert "s3://bucket/deam as AWS_ACCESS_KEY_ID: 13 label, metadata and audio files" in found["data.source"].found
    assert "1.0 MB" in found["vit.weights"].found


@pytest.mark.parametrize(("minutes", "status"), [(-6, "wrong"), (6, "wrong"), (4, "ok")])
def test_a_clock_that_differs_from_the_servers_by_over_five_minutes_is_wrong(
    store: ScriptedS3, minutes: int, status: str
) -> None:
    theirs = datetime.now(UTC) + timedelta(minutes=minutes)
    store.on("*", "*", with_headers(Date=format_datetime(theirs, usegmt=True)), times=math.inf)
    clock = stores("data.source=s3://bucket/deam", endpoint(store))["clock"]
    assert (clock.status, clock.exit_code) == (status, 0 if status == "ok" else 69)
    assert ("behind" in clock.found) == (minutes > 0)
    assert ("Set this machine's clock" in clock.remedy) == (status == "wrong")


def test_a_port_where_nobody_answers_is_unavailable_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.machine.stores.PATIENCE_SECONDS", 0.1)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    found = stores("data.source=s3://bucket/deam", f"storage.endpoint_url=http://127.0.0.1:{free_port()}")
    assert [*found] == ["data.source"], "without an answer nothing is known of the clock"
    assert (found["data.source"].status, found["data.source"].exit_code) == ("wrong", 69)
    assert "s3://bucket/deam as anonymous: " in found["data.source"].found


def test_a_credential_that_a_server_does_not_know_is_denied_and_named_by_its_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "0")  # moto verifies who asks
    with moto_server() as server:
        profile = f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
        (tmp_path / "credentials").write_text(profile)
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        found = stores("artifacts.destination=s3://bucket/published", f"storage.endpoint_url={server.endpoint_url}")
    check = found["artifacts.destination"]
    assert (check.status, check.exit_code) == ("wrong", 77)
    assert f"as aws_access_key_id of profile default in {tmp_path / 'credentials'}: " in check.found
    assert "InvalidAccessKeyId" in check.found
    assert found["clock"].status == "ok", "a refusal has a date, too"
    assert SECRET not in str(found)


@pytest.mark.full
def test_radosgw_refuses_a_secret_that_is_not_the_users(radosgw: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**radosgw.environment(), "AWS_SECRET_ACCESS_KEY": SECRET}.items():
        monkeypatch.setenv(name, value)
    bucket = radosgw.new_bucket()
    found = stores(f"artifacts.destination=s3://{bucket}", f"storage.endpoint_url={radosgw.endpoint_url}")
    check = found["artifacts.destination"]
    assert (check.status, check.exit_code) == ("wrong", 77)
    assert "SignatureDoesNotMatch" in check.found
    assert "AWS_ACCESS_KEY_ID" in check.found
    assert SECRET not in str(check)


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ("data.source=/no/songs", 65, "there is no folder /no/songs"),
        ("checkpoint.mirror=/no/mirror", 69, "there is no such folder"),
        ("vit.weights=/no/weights.safetensors", 65, "there is no file /no/weights.safetensors"),
        ("vit.teacher=/tmp", 65, "/tmp is a folder, expected a file"),
        ("data.manifest=/tmp", 65, "/tmp is a folder, expected a file"),
    ],
)
def test_a_folder_or_file_that_is_not_here_is_named(setting: str, code: int, said: str) -> None:
    check = stores(setting)[setting.partition("=")[0]]
    assert (check.status, check.exit_code) == ("wrong", code)
    assert said in check.found
    assert check.remedy
