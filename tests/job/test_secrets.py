"""Secrets in the spellings that other programs give them, and texts that hold none."""

import base64
import html
import json
import logging
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest

from job import secrets
from job.secrets import ScrubbingFormatter, known_secret, protect, scrubbed, scrubbed_json, secrets_of, spellings

CANARIES = {
    "a newline": "FwoGZXIvYXdzEKanary0123456789\n",
    "quotes": "FwoGZX'Iv\"canary9Zq8Wx7Vy6",
    "a backslash": "FwoGZX\\nIvYcanary9Zq8Wx7\\Vy6",
    "base64": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYcanaryKEY==",
    "letters of other languages": "gehëimes-canary-Wört-0815-Zq8Wx7",
    "markup": "FwoGZX<Iv&canary9Zq8Wx7>Vy6",
    "a blank": "canary of 8 coal mines Zq8Wx7Vy6",
    "a percent sign": "FwoGZX%2Fcanary%9Zq8Wx7",
}
TEXTS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "stripped": str.strip,
    "header": lambda secret: f"Invalid header value {secret.encode()!r}",
    "repr": repr,
    "repr of a repr": lambda secret: repr(repr(secret)),
    "JSON": json.dumps,
    "JSON in JSON": lambda secret: json.dumps({"message": json.dumps({"token": secret})}),
    "repr in JSON": lambda secret: json.dumps(f"ValueError({secret!r})"),
    "percent-encoded": lambda secret: urllib.parse.quote(secret, safe=""),
    "percent-encoded twice": lambda secret: urllib.parse.quote(urllib.parse.quote(secret, safe=""), safe=""),
    "query": lambda secret: urllib.parse.urlencode({"token": secret}),
    "base64": lambda secret: base64.b64encode(secret.encode()).decode(),
    "base64 of the stripped": lambda secret: base64.b64encode(secret.strip().encode()).decode(),
    "basic authentication": lambda secret: base64.b64encode(f"user:{secret}".encode()).decode(),
    "URL-safe base64": lambda secret: base64.urlsafe_b64encode(f"me:{secret}".encode()).decode(),
    "hexadecimal": lambda secret: secret.encode().hex(),
    "HTML": html.escape,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("canary", CANARIES.values(), ids=CANARIES)
def test_a_secret_is_found_in_every_spelling(monkeypatch: pytest.MonkeyPatch, canary: str, text: Callable[[str], str]) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", canary)
    written = f"before {text(canary)} after"
    found = scrubbed(written)
    assert found != written
    assert "[AWS_SESSION_TOKEN]" in found
    for part in ("canary", "Zq8Wx7", "K7MDENG", *(word.encode().hex() for word in ("canary", "Zq8Wx7"))):
        assert part not in found
    # In base64 the first and the last letter belong in part to their neighbours.
    remainder = found.removeprefix("before ").removesuffix(" after").replace("[AWS_SESSION_TOKEN]", "")
    assert len(remainder) <= 40, found
    assert known_secret(written) == "AWS_SESSION_TOKEN"


@pytest.mark.parametrize(
    ("name", "value", "text", "left"),
    [
        ("HTTPS_PROXY", "http://me:pa%24%24word9@proxy:3128", "Failed to parse: http://me:pa%24%24word9@proxy:3128", "pa%24"),
        ("https_proxy", "me:pa$$word9@proxy:3128", "proxy me:pa$$word9@proxy:3128 answers 407", "word9"),
        ("ALL_PROXY", "http://me:pa$$word9@proxy:3128", base64.b64encode(b"me:pa$$word9").decode(), "bWU6cGEk"),
        ("INDEX_URL", "https://oauth2accesstoken9Zq8@host/simple", "no oauth2accesstoken9Zq8", "9Zq8"),
        ("WANDB_API_KEY", "5f2c8a11d0e94b7c", "key 5f2c8a11d0e94b7c", "5f2c"),
        ("DB_PASSWORD", "correct horse battery", "with correct horse battery", "horse"),
        ("MY_SERVICE_TOKEN", "tok9Zq8Wx7Vy6", "tok9Zq8Wx7Vy6", "Zq8"),
        ("AWS_ACCESS_KEY_ID", "ASIAQWERTYUIOPASDFGH", "Credential=ASIAQWERTYUIOPASDFGH/2026", "QWERTY"),
        ("UNRELATED", "x", "https://user:p@ss@host/x", "p@ss"),
        ("UNRELATED", "x", "GET /x?a=1&X-Amz-Signature=abc123&X-Amz-Security-Token=Fwo%2FGZ", "abc123"),
        ("UNRELATED", "x", "GET /x?X-Amz-Security-Token=FwoGZ", "FwoGZ"),
        ("UNRELATED", "x", "{'Authorization': 'AWS4-HMAC-SHA256 Credential=A/2, Signature=abc123'}", "abc123"),
        ("UNRELATED", "x", "Authorization: Bearer abcdef0123456789", "abcdef"),
        ("UNRELATED", "x", "token hf_abcdefghijklmnopqrstuvwxyz12345678 is wrong", "abcdef"),
    ],
)
def test_secrets_of_urls_and_of_other_variables_are_found(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str, left: str
) -> None:
    monkeypatch.setenv(name, value)
    assert left not in scrubbed(text)


ORDINARY = [
    "phase=gan step=1200/20000 d_loss=0.61 g_loss=1.08 images_per_second=2140",
    "storage: s3:GetObject s3://deam-songs-2024/audio/10.mp3: HTTP 503 SlowDown, trying again",
    "region eu-central-1, bucket deam-songs-2024, /data/DEAM/audio, https://store.example:9000/x",
    "write to me@host, see https://huggingface.co/timm (hf_hub), token=1 signature: none, authorization is missing",
    "the key of a phase, a secret place, a token bucket, true, 1, 20000, linux",
    'data.source: {"path": "/data/DEAM", "key": "audio/10.mp3"}',
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_are_unchanged(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for name, value in {
        "A_TOKEN": "true",
        "B_SECRET": "1",
        "C_KEY": "audio/10.mp3",
        "D_SECRET": "deam-songs-2024",
        "E_TOKEN": "eu-central-1",
        "F_KEY": "/data/DEAM/audio",
        "G_SECRET_URL": "https://store.example:9000/x",
        "H_SECRET": "https://store.example:9000/x",
        "I_KEY": "20000",
        "J_TOKEN_TYPE": "images_per_second",
        "AWS_SECRET_ACCESS_KEY": "s3",
        "AWS_ACCESS_KEY_ID": "deam",
        "AWS_SESSION_TOKEN": "",
        "HF_TOKEN": "linux",
        "KEYBOARD": "phase=gan step",
        "TOKENIZERS_PARALLELISM": "images_per_second",
        "NO_PROXY": "store.example,host",
        "GIT_AUTHOR": "write to me@host",
    }.items():
        monkeypatch.setenv(name, value)
    assert scrubbed(text) == text
    assert known_secret(text) is None


def test_a_secret_that_is_a_word_of_this_program_changes_none_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_SECRET_ACCESS_KEY": "training",
        "AWS_SESSION_TOKEN": "features\n",
        "DB_PASSWORD": "validation_ccc",
        "HTTPS_PROXY": "http://me:valence_true@proxy:8080",
        "HF_TOKEN": "trainin-g",
    }.items():
        monkeypatch.setenv(name, value)
    text = "phase=features begins, training_ccc=0.1 validation_ccc_valence=0.2 valence_true"
    assert scrubbed(text) == text
    assert known_secret(text) is None
    assert scrubbed("header trainin-g") == "header [HF_TOKEN]"


def test_secrets_in_token_files_are_found_and_pipes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("eyJhbGciOiJSUzI1NiJ9.canary\n")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "pipe"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "absent"))
    assert scrubbed("sent eyJhbGciOiJSUzI1NiJ9.canary") == "sent [AWS_WEB_IDENTITY_TOKEN_FILE]"


def test_a_protected_secret_is_found_and_a_short_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_protected", set())
    protect("the AWS secret key", "Zq8Wx7Vy6canary")
    protect("short", "1234")
    protect("none", None)
    assert scrubbed("1234 Zq8Wx7Vy6canary") == "1234 [the AWS secret key]"


@pytest.mark.parametrize("length", [12, 20, 41])
def test_the_beginning_of_a_secret_that_a_message_cuts_off_is_found(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    secret = "IQoJb3JpZ2luX2VjEKcanary/Zq8Wx7+Vy6Ut5Sr4Qp3"
    monkeypatch.setenv("AWS_SESSION_TOKEN", secret)
    for text in (secret, urllib.parse.quote(secret, safe=""), base64.b64encode(secret.encode()).decode()):
        assert scrubbed(f"expected a number, found {text[:length]}…") == "expected a number, found [AWS_SESSION_TOKEN]…"
    assert scrubbed(f"twice {secret[:20]}… {secret[:30]}…") == "twice [AWS_SESSION_TOKEN]… [AWS_SESSION_TOKEN]…"


def test_of_a_secret_with_a_long_run_of_letters_inside_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run alone is a spelling, too."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong/Secret+Key0123456789canaryZq8Wx7Vy6")
    assert scrubbed("key wrong/Secret+Key0123456789canaryZq8Wx7Vy6.") == "key [AWS_SECRET_ACCESS_KEY]."
    assert scrubbed("key Key0123456789canaryZq8Wx7Vy6.") == "key [AWS_SECRET_ACCESS_KEY]."


def test_the_cut_off_beginning_of_a_secret_inside_another_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://bob:S3cr3tLongPassw0rd0123456789@proxy.example:3128")
    assert scrubbed("password 'S3cr3tLongPassw0rd012345' is wrong") == "password '[HTTPS_PROXY]' is wrong"


def test_json_values_are_scrubbed_at_any_depth() -> None:
    record = {
        "a": ["s3://key:secret@bucket/x", "no url: me@home"],
        "b": {"c": "cannot read https://me@host/p?q=a@b (twice: https://u:p@h/)"},
        "d": 1,
    }
    assert scrubbed_json(record) == {
        "a": ["s3://bucket/x", "no url: me@home"],
        "b": {"c": "cannot read https://host/p?q=a@b (twice: https://h/)"},
        "d": 1,
    }


def test_a_part_of_a_secret_is_no_spelling_of_it_unless_it_is_long() -> None:
    assert "training" not in spellings("training of 9 models + Zq8Wx7Vy6canary")
    assert "Zq8Wx7Vy6canary" in spellings("training of 9 models + Zq8Wx7Vy6canary")


def test_log_lines_and_their_tracebacks_are_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoGZXIvYcanary\n")
    try:
        raise ValueError(f"Invalid header value {os.environ['AWS_SESSION_TOKEN'].encode()!r}")
    except ValueError:
        record = logging.LogRecord("job", logging.ERROR, "x.py", 1, "got %s", ("FwoGZXIvYcanary",), sys.exc_info())
    line = ScrubbingFormatter("%(message)s").format(record)
    assert line.startswith("got [AWS_SESSION_TOKEN]\nTraceback")
    assert "canary" not in line


@pytest.mark.parametrize("where", ["main", "thread", "log"])
def test_what_nobody_catches_is_printed_without_secrets(where: str) -> None:
    program = f"""
import logging, os, threading
from job.secrets import scrub_tracebacks
scrub_tracebacks()
def fail():
    raise ValueError("header " + repr(os.environ["AWS_SESSION_TOKEN"]))
if {where!r} == "thread":
    thread = threading.Thread(target=fail); thread.start(); thread.join()
elif {where!r} == "log":
    logging.getLogger("library").warning("header %r", os.environ["AWS_SESSION_TOKEN"])
else:
    fail()
"""
    environment = {**os.environ, "AWS_SESSION_TOKEN": "FwoGZXIvYcanary\n"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert "canary" not in found.stderr
    assert "header '[AWS_SESSION_TOKEN]" in found.stderr


def test_texts_are_scrubbed_by_many_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_protected", set())
    failures: list[str] = []

    def work(number: int) -> None:
        for step in range(5):
            protect(f"secret {number}", f"Zq8Wx7Vy6canary-{number}-{step}")
            text = scrubbed(f"Zq8Wx7Vy6canary-{number}-{step}")
            if "canary" in text:
                failures.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_names_of_variables_say_what_is_secret() -> None:
    value = "Zq8Wx7Vy6canary"
    secret = ["MY_SECRET", "GITHUB_TOKEN", "db_password", "API_KEY", "OPENAI_APIKEY", "KEY", "AZURE_STORAGE_KEY", "PGPASSWORD"]
    public = ["AWS_WEB_IDENTITY_TOKEN_FILE", "SECRET_NAME", "KEYBOARD", "MONKEY", "TOKENIZERS", "KMS_KEY_ID", "KMS_KEY_ARN"]
    assert [name for name, _ in secrets_of(dict.fromkeys([*secret, *public], value))] == secret
