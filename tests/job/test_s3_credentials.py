"""Credentials and settings with which no request can succeed: nothing is sent, and no message has a value of a secret."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from emotion.errors import AccessError, EmotionError, SpecError, StorageError
from job.config import StorageConfig
from job.spec.location import S3
from job.storage.open import open_storage
from tests.job.test_secrets import CANARIES, TEXTS
from tests.stores.certificates import Authority
from tests.stores.dataset import assert_error, fill, looked_up, storage_of
from tests.stores.proxy import refusing_proxy
from tests.stores.scripted import ScriptedS3

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
GOOD = {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYcanaryKEY"}


def refused(store: ScriptedS3, listing: bool = True) -> EmotionError:
    """The error of the first request; nothing may reach the server, and nothing may be waited for."""
    storage = storage_of(store, patience_seconds=1e6)
    with pytest.raises(EmotionError) as caught:
        next(iter(storage.entries())) if listing else storage.entry("big.bin")
    assert store.requests == []
    assert "\n" not in str(caught.value)
    assert "canary" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("listing", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("AWS_SESSION_TOKEN", "FwoGZcanary\n", "ends in a line break"),
        ("AWS_SESSION_TOKEN", "FwoGZcanary\r\n", "ends in a carriage return"),
        ("AWS_SECRET_ACCESS_KEY", "wJalr\tcanary", "has a tab inside"),
        ("AWS_SECRET_ACCESS_KEY", " canary", "has a blank at its beginning"),
        ("AWS_ACCESS_KEY_ID", "AKIAcanary\n", "ends in a line break"),
        ("AWS_ACCESS_KEY_ID", " ", "ends in a blank"),
        ("AWS_SESSION_TOKEN", "FwoGZ…canary", "has a character that is not ASCII inside"),
        ("AWS_SESSION_TOKEN", "FwoGZ\x7fcanary", "has a control character inside"),
        ("AWS_SESSION_TOKEN", "\ufeffFwoGZcanary", "has a character that is not ASCII at its beginning"),
    ],
)
def test_malformed_credentials_are_refused_by_the_name_of_their_variable(
    store: ScriptedS3, monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str, listing: bool
) -> None:
    monkeypatch.setenv(name, value)
    error = refused(store, listing)
    assert (error.exit_code, f"{name} {problem}" in str(error)) == (77, True), str(error)


class Profile:
    """AWS's own files, and nothing else that has credentials."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.credentials, self._monkeypatch = folder / "config", folder / "credentials", monkeypatch
        for name in KEYS:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(self.config))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(self.credentials))
        monkeypatch.setenv("HOME", str(folder))  # where tokens of single sign-on are

    def write(self, config: str = "", credentials: str = "", **variables: str) -> None:
        self.config.write_text(config)
        self.credentials.write_text(credentials)
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profile:
    return Profile(tmp_path, monkeypatch)


def helper(answer: str) -> str:
    return f"[default]\ncredential_process = sh -c 'printf %s \"$0\"' {json.dumps(answer)}\n"


SSO = "sso_start_url = https://x/start\nsso_region = eu-west-1\nsso_account_id = 1\nsso_role_name = r\n"
SESSION = f"[profile p]\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\n[sso-session s]\n{SSO}"
ROLE = "[profile p]\nrole_arn = arn:aws:iam::1:role/x\n"
TOKEN_OF_ROLE = {"AWS_WEB_IDENTITY_TOKEN_FILE": "/no/token", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x"}
SERVICE = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:9/x"}


@pytest.mark.parametrize(
    ("config", "variables", "exit_code", "words"),
    [
        ("", {"AWS_PROFILE": "nosuch"}, 77, ["nosuch", "AWS_PROFILE"]),
        ("no section\n", {}, 64, ["config", "AWS_CONFIG_FILE"]),
        ("[default]\ncredential_process = /no/helper --secret canary\n", {}, 77, ["credential_process", "/no/helper"]),
        ("[default]\ncredential_process = sh -c 'echo it is denied >&2; exit 3'\n", {}, 77, ["runs sh", "it is denied"]),
        ("[default]\ncredential_process = 'echo\n", {}, 77, ["quotes that do not match"]),
        (helper("no JSON"), {}, 77, ["credential_process", "runs sh"]),
        (helper("[]"), {}, 77, ["credential_process", "runs sh"]),
        (f"[profile p]\n{SSO}", {"AWS_PROFILE": "p"}, 77, ["`aws sso login --profile p`"]),
        (SESSION, {"AWS_PROFILE": "p"}, 77, ["`aws sso login --profile p`"]),
        ("[profile p]\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\n", {"AWS_PROFILE": "p"}, 77, ["profile p in"]),
        (ROLE, {"AWS_PROFILE": "p"}, 77, ["source_profile"]),
        (f"{ROLE}source_profile = p\n", {"AWS_PROFILE": "p"}, 77, ["profile p"]),
        ("", TOKEN_OF_ROLE, 77, ["/no/token", "AWS_WEB_IDENTITY_TOKEN_FILE"]),
        ("", {**SERVICE, "AWS_CONTAINER_AUTHORIZATION_TOKEN": "canary12\n"}, 77, ["AWS_CONTAINER_AUTHORIZATION_TOKEN"]),
        ("", {**SERVICE, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "/no/t"}, 77, ["/no/t", "AUTHORIZATION_TOKEN_FILE"]),
        ("", {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://evil.example/x"}, 77, ["AWS_CONTAINER_CREDENTIALS_FULL_URI"]),
        ("", {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE"}, 77, ["AWS_SECRET_ACCESS_KEY"]),
        ("", {**GOOD, "AWS_DEFAULT_REGION": "us-east-1\n"}, 64, ["'us-east-1\\n' is no region", "AWS_DEFAULT_REGION"]),
        ("", {**GOOD, "AWS_DEFAULTS_MODE": "foo"}, 64, ["foo"]),
        ("[default]\ns3 =\n  addressing_style = foo\n", GOOD, 64, ["foo"]),
    ],
    ids=[
        "no such profile",
        "unparsable configuration",
        "helper absent",
        "helper fails",
        "helper with a quote",
        "helper answers no JSON",
        "helper answers a list",
        "no SSO token",
        "no SSO token of a session",
        "no such SSO session",
        "role without a source",
        "role of itself",
        "no web identity token",
        "container token with a newline",
        "no container token",
        "foreign container service",
        "half of the credentials",
        "region with a newline",
        "defaults mode",
        "addressing style",
    ],
)
def test_what_can_never_work_ends_the_job_at_once(
    store: ScriptedS3, profile: Profile, config: str, variables: dict[str, str], exit_code: int, words: list[str]
) -> None:
    profile.write(config, **variables)
    error = refused(store)
    assert (error.exit_code, [word for word in words if word not in str(error)]) == (exit_code, []), str(error)
    assert not error.retry_helps


def test_malformed_credentials_of_a_file_are_refused_by_file_profile_and_key(store: ScriptedS3, profile: Profile) -> None:
    profile.write("", "[default]\naws_access_key_id = AKIA1\naws_secret_access_key = wJalr canary\n")
    assert f"aws_secret_access_key of profile default in {profile.credentials} has a blank inside" in str(refused(store))


def test_malformed_credentials_of_a_helper_are_refused_by_its_name(store: ScriptedS3, profile: Profile) -> None:
    answer = {"Version": 1, "AccessKeyId": "AKIA1", "SecretAccessKey": "x", "SessionToken": "canary\n"}
    (profile.config.parent / "answer").write_text(json.dumps(answer))
    profile.write(f"[default]\ncredential_process = cat {profile.config.parent / 'answer'}\n")
    assert "SessionToken from credential_process cat of profile default ends in a line break" in str(refused(store))


def test_a_service_for_credentials_that_does_not_answer_may_do_so_later(
    store: ScriptedS3, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
    profile.write(**SERVICE)
    error = refused(store)
    assert (type(error), error.exit_code) == (StorageError, 69)
    assert "AWS_CONTAINER_CREDENTIALS_FULL_URI" in str(error)


@pytest.mark.parametrize("canary", CANARIES.values(), ids=CANARIES)
def test_no_message_of_a_helper_or_a_server_gives_a_secret_away(
    store: ScriptedS3, profile: Profile, canary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A helper that fails prints the secret in all spellings that fit into a line."""
    printed = " ".join(text(canary) for text in TEXTS.values())
    (profile.config.parent / "printed").write_text(printed)
    profile.write(
        f"[default]\ncredential_process = sh -c 'cat {profile.config.parent / 'printed'} >&2; exit 1'\n",
        MY_SECRET_PASSWORD=canary,
    )
    error = refused(store)
    assert "[MY_SECRET_PASSWORD]" in str(error)
    assert "Zq8Wx7" not in str(error)


# Certificates


@pytest.fixture
def tls_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedS3]:
    with ScriptedS3(Authority(tmp_path).server()) as store:
        fill(store)
        for name, value in store.address.environment().items():
            monkeypatch.setenv(name, value)
        yield store


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle"])
@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file"), ("", "holds no certificates"), ("# text\n", "holds no certificates")]
)
def test_a_file_of_authorities_that_is_absent_or_empty_is_named(
    tls_store: ScriptedS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, words: str
) -> None:
    path = tmp_path / "stale.pem"
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    if content is not None:
        path.write_text(content)
    if name == "ca_bundle":
        (tmp_path / "config").write_text(f"[default]\nca_bundle = {path}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    else:
        monkeypatch.setenv(name, str(path))
    error = refused(tls_store)
    assert (type(error), error.exit_code) == (SpecError, 64)
    assert [word for word in (name, str(path), words) if word not in str(error)] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_of_authorities_that_must_not_be_read_is_a_matter_of_access(
    tls_store: ScriptedS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.pem").touch(0)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "secret.pem"))
    assert type(refused(tls_store)) is AccessError


def test_a_stale_file_of_authorities_does_not_matter_without_tls(store: ScriptedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such/file.pem")
    assert looked_up(store).size == 1_000_000


def test_a_proxy_that_wants_other_credentials_is_named_without_its_password(
    store: ScriptedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing_proxy(407) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:canaryPa55word@127.0.0.1:{port}")
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://store.example")
        with pytest.raises(AccessError) as caught:
            open_storage(S3("bucket", "deam"), StorageConfig(patience_seconds=1e6), lambda: False).entry("x")
        assert_error(caught, AccessError, 77, "HTTPS_PROXY", "407")
        assert "canary" not in str(caught.value)
