"""Jobs as processes whose token is a canary: it is in no output, no file of the run, and nothing that is published."""

import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from job.results.manifest import MANIFEST
from tests.conftest import TINY, TinyRun
from tests.job.test_s3_job import staging
from tests.job.test_secrets import CANARIES, TEXTS
from tests.stores.dataset import AUDIO
from tests.stores.scripted import Answer, Request, ScriptedS3, _error

Command = Callable[..., subprocess.CompletedProcess[str]]
CANARY = CANARIES["base64"]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_no_canary(canary: str, contents: Iterable[tuple[str, bytes]]) -> None:
    """The canary is not in these contents, in no spelling."""
    spelt = {text(part) for text in TEXTS.values() for part in (canary, canary.strip())}
    found = [(name, text) for name, content in contents for text in spelt if text.encode() in content]
    assert found == []
    assert [name for name, content in contents if b"canary" in content or b"Zq8Wx7" in content] == []


def outputs_of(found: subprocess.CompletedProcess[str]) -> dict[str, bytes]:
    return {"stdout": found.stdout.encode(), "stderr": found.stderr.encode()}


@pytest.mark.parametrize("name", ["AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"])
def test_a_job_with_a_newline_in_its_credentials_ends_with_77_and_gives_nothing_away(
    emotion_job: Command, store: ScriptedS3, tmp_path: Path, name: str
) -> None:
    canary = "FwoGZXIvYXdzEKcanaryZq8Wx7Vy6\n"
    found = emotion_job(*staging(tmp_path), **{name: canary})
    assert found.returncode == 77, found.stderr
    assert found.stderr.splitlines() == [line for line in found.stderr.splitlines() if line.startswith("emotion-job: ")]
    assert f"{name} ends in a line break" in found.stderr
    assert store.requests == []
    assert_no_canary(canary, (files_below(tmp_path) | outputs_of(found)).items())


def echo(status: int, code: str) -> Callable[[Request, Callable[[], Answer]], Answer]:
    """A server that repeats the token that it was sent, in all spellings."""

    def answer(request: Request, honest: Callable[[], Answer]) -> Answer:
        token = request.headers.get("x-amz-security-token", "")
        texts = " ".join(text(token) for text in TEXTS.values())
        return _error(status, code, texts.replace("&", "&amp;").replace("<", "&lt;"))

    return answer


@pytest.mark.parametrize(("status", "code", "times", "exit_code"), [(503, "SlowDown", 2, 0), (403, "InvalidToken", math.inf, 77)])
def test_a_server_that_repeats_the_token_gives_nothing_away(
    emotion_job: Command, store: ScriptedS3, tmp_path: Path, status: int, code: str, times: float, exit_code: int
) -> None:
    store.on("GetObject", f"{AUDIO}/*", echo(status, code), times=times)
    found = emotion_job(*staging(tmp_path), AWS_SESSION_TOKEN=CANARY)
    assert found.returncode == exit_code, found.stderr
    assert "[AWS_SESSION_TOKEN]" in found.stderr
    assert_no_canary(CANARY, (files_below(tmp_path) | outputs_of(found)).items())


def unpublished(run: TinyRun, folder: Path) -> Path:
    """A copy of a finished run that lacks its last phase. Returns its run folder."""
    work = shutil.copytree(run.work, folder / "work")
    shutil.rmtree(work / "published")
    copied = work / run.run_folder.name
    for path in copied.glob("publish-*"):
        shutil.rmtree(path)
    return copied


@pytest.mark.full
@pytest.mark.parametrize("kind", ["a newline", "quotes", "base64"])
def test_logs_that_hold_a_secret_from_before_are_published_without_it(
    emotion_job: Command, tiny_run: TinyRun, tmp_path: Path, kind: str
) -> None:
    canary = CANARIES[kind]
    folder = unpublished(tiny_run, tmp_path)
    with (folder / "job.log").open("a") as log:
        log.writelines(f"a line with {text(canary)} in it\n" for text in TEXTS.values())
    found = emotion_job("run", TINY, "--work", folder.parent, AWS_SESSION_TOKEN=canary)
    assert found.returncode == 0, found.stderr
    published = files_below(folder.parent / "published")
    assert any(name.endswith(MANIFEST) for name in published)
    assert any(b"a line with [AWS_SESSION_TOKEN] in it" in content for content in published.values())
    assert_no_canary(canary, (published | outputs_of(found)).items())


@pytest.mark.full
def test_a_run_whose_files_hold_a_secret_is_not_published(emotion_job: Command, tiny_run: TinyRun, tmp_path: Path) -> None:
    """A variable that is named like a secret, with a text of the report."""
    folder = unpublished(tiny_run, tmp_path)
    found = emotion_job("run", TINY, "--work", folder.parent, DB_PASSWORD="<!doctype html>")
    assert found.returncode == 70, found.stderr
    assert "report.html holds the value of DB_PASSWORD" in found.stderr
    assert not list(folder.parent.glob("published/*/*"))


@pytest.mark.full
def test_a_password_with_the_name_of_a_metric_does_not_keep_a_run_from_being_published(
    emotion_job: Command, tiny_run: TinyRun, tmp_path: Path
) -> None:
    folder = unpublished(tiny_run, tmp_path)
    found = emotion_job("run", TINY, "--work", folder.parent, DB_PASSWORD="validation_ccc", AWS_SECRET_ACCESS_KEY="training")
    assert found.returncode == 0, found.stderr
    assert "[DB_PASSWORD]" not in found.stderr
    [lines] = [content for name, content in files_below(folder.parent / "published").items() if name.endswith("metrics.jsonl")]
    assert b'"validation_ccc_valence"' in lines


def test_a_spec_that_holds_a_secret_is_refused_before_any_work(emotion_job: Command, tmp_path: Path) -> None:
    words = ["--set", f"data.source=/data/{CANARY}"]
    found = emotion_job("run", TINY, "--work", tmp_path / "work", *words, HF_TOKEN=CANARY)
    assert found.returncode == 64, found.stderr
    assert "data.source holds the value of HF_TOKEN" in found.stderr
    assert not (tmp_path / "work").exists()
    assert_no_canary(CANARY, outputs_of(found).items())


def test_a_malformed_proxy_gives_no_part_of_its_password_away(emotion_job: Command, tmp_path: Path) -> None:
    proxy = "http://me:canary/Zq8Wx7@127.0.0.1:port"
    nothing = dict.fromkeys((name for name in os.environ if name.startswith("AWS_") and "BUNDLE" not in name), "")
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_CONFIG_FILE": os.devnull}
    proxies = {"HTTP_PROXY": proxy, "http_proxy": proxy, "NO_PROXY": "", "no_proxy": ""}
    environment = {**nothing, **keys, **proxies, "AWS_ENDPOINT_URL_S3": "http://store.example"}
    found = emotion_job(*staging(tmp_path), **environment)
    assert found.returncode == 64, found.stderr
    assert "HTTP_PROXY" in found.stderr
    assert_no_canary("canary/Zq8Wx7", (files_below(tmp_path) | outputs_of(found)).items())
