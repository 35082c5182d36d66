"""What `predict` takes: files, folders, pipes, standard input and S3; anything else is named as what it is."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from emotion.errors import AccessError, DataError, EmotionError, Interrupted, SpecError, StorageError
from job.results.manifest import MANIFEST, PREDICTION_FILES, verified_manifest
from job.results.sounds import Sounds, fetched_model
from tests.conftest import TinyRun
from tests.stores.servers import S3Server


def never() -> bool:
    return False


@pytest.fixture
def said_of(tmp_path: Path) -> Callable[[str | Path], str]:
    """Why there is no sound; the error is a DataError."""

    def refusal(argument: str | Path) -> str:
        ((name, error),) = Sounds([str(argument)], tmp_path, never)
        assert name == str(argument)
        assert isinstance(error, DataError)
        return str(error)

    return refusal


def contents(found: list[tuple[str, Path | EmotionError]]) -> list[tuple[str, bytes]]:
    return [(name, path.read_bytes()) for name, path in found if isinstance(path, Path)]


def test_a_folder_stands_for_all_audio_files_below_it(tmp_path: Path) -> None:
    for name in ("b.mp3", "a/2.OPUS", "a/notes.txt", ".hidden/1.mp3", "a/.cache/2.wav", "c.m4a", "mp3"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "circle").symlink_to(tmp_path)
    found = [name.removeprefix(f"{tmp_path}/") for name, _ in Sounds([str(tmp_path)], tmp_path, never)]
    assert found == ["a/2.OPUS", "b.mp3", "c.m4a"]


def test_sounds_are_counted_before_the_first_is_read(tmp_path: Path) -> None:
    (tmp_path / "songs").mkdir()
    for name in ("1.mp3", "2.wav"):
        (tmp_path / "songs" / name).touch()
    os.mkfifo(tmp_path / "pipe")
    some = Sounds([str(tmp_path / "songs"), str(tmp_path / "pipe"), str(tmp_path / "absent")], tmp_path, never)
    assert (some.count, some.refusals) == (4, [])
    none = Sounds([str(tmp_path / "absent"), "gs://bucket"], tmp_path, never)
    assert [type(error) for error in none.refusals] == [DataError, SpecError]


def test_what_is_no_file_is_named(tmp_path: Path, said_of: Callable[[str | Path], str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.mp3").symlink_to("annex/objects/1.mp3")
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        assert f"{tmp_path / 's'} is a socket" in said_of(tmp_path / "s")
    assert "is a folder without audio files (mp3, wav, " in said_of(tmp_path / "empty")
    assert "is a link to annex/objects/1.mp3, which is not here" in said_of(tmp_path / "link.mp3")
    assert f"there is no file {tmp_path / 'absent.mp3'}" in said_of(tmp_path / "absent.mp3")
    assert "there is no file" in said_of(tmp_path / "file" / "below.mp3")
    assert "/dev/zero is a terminal or another device" in said_of("/dev/zero")
    for url in ("https://host/song.mp3", "gs://bucket/song.mp3"):
        ((_, error),) = Sounds([url], tmp_path, never)
        assert isinstance(error, SpecError)
        assert f"{url}: {url.split('/')[0]}// is not supported here" in str(error)


def test_a_url_of_a_local_file_is_its_path(tmp_path: Path) -> None:
    (tmp_path / "1.mp3").write_bytes(b"1")
    url = f"file://{tmp_path}/1.mp3"
    assert list(Sounds([url], tmp_path, never)) == [(url, tmp_path / "1.mp3")]


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    content = os.urandom(300_000)  # more than a pipe holds
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,), daemon=True)
    writer.start()
    try:
        found = iter(Sounds([str(tmp_path / "pipe"), str(tmp_path / "absent")], tmp_path, never))
        assert contents([next(found)]) == [(str(tmp_path / "pipe"), content)]
        assert isinstance(next(found)[1], DataError)
    finally:
        writer.join(10)


def test_a_pipe_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.results.sounds.MOST_PIPED_BYTES", 100_000)
    read, write = os.pipe()
    with open(read, "rb"), open(write, "wb") as sink:  # noqa: PTH123
        sink.write(bytes(60_000))
        sink.flush()
        ended = threading.Timer(0, sink.write, [bytes(60_000)])
        ended.start()
        ((_, error),) = Sounds([f"/dev/fd/{read}"], tmp_path, never)
        ended.join()
    assert f"/dev/fd/{read} gives more than" in str(error)


def test_waiting_for_a_pipe_can_be_stopped(tmp_path: Path) -> None:
    read, write = os.pipe()
    with open(read, "rb"), open(write, "wb"), pytest.raises(Interrupted):  # noqa: PTH123
        list(Sounds([f"/dev/fd/{read}"], tmp_path, lambda: True))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed_is_an_error_of_access(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o000)
    ((_, error),) = Sounds([str(tmp_path)], tmp_path, never)
    assert isinstance(error, AccessError)


def test_sounds_in_object_storage_are_fetched(moto: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    client, bucket = moto.client(), moto.new_bucket()
    for key in (
        "music/b.mp3",
        "music/a/1.ogg",
        "music/notes.txt",
        "run/manifest.json",
        "run/model/config.json",
        "run/logs/job.log",
    ):
        client.put_object(Bucket=bucket, Key=key, Body=key.encode())
    urls = [f"s3://{bucket}/music/b.mp3", f"s3://{bucket}/music"]
    fetched = []
    for name, path in Sounds(urls, tmp_path, never):
        assert isinstance(path, Path)
        fetched.append((name, path.suffix, path.read_bytes()))
    first = (f"s3://{bucket}/music/a/1.ogg", ".ogg", b"music/a/1.ogg")
    second = (f"s3://{bucket}/music/b.mp3", ".mp3", b"music/b.mp3")
    assert fetched == [second, first, second]
    assert list(tmp_path.iterdir()) == []

    absent, empty = (error for _, error in Sounds([f"s3://{bucket}/music/c.mp3", f"s3://{bucket}/run"], tmp_path, never))
    assert isinstance(absent, StorageError)
    assert isinstance(empty, DataError)
    assert "has no audio files below it" in str(empty)

    model = fetched_model(f"s3://{bucket}/run", tmp_path, never)
    found = sorted(path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file())
    assert found == ["manifest.json", "model/config.json"]
    with pytest.raises(DataError, match=r"holds no model\.safetensors"):
        fetched_model(f"s3://{bucket}/music", tmp_path / "other", never)


def test_a_published_run_in_object_storage_is_fetched_with_all_that_its_manifest_says(
    tiny_run: TinyRun, moto: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    client, bucket = moto.client(), moto.new_bucket()
    for path in (path for path in tiny_run.published.rglob("*") if path.is_file()):
        client.put_object(Bucket=bucket, Key=f"run/{path.relative_to(tiny_run.published)}", Body=path.read_bytes())
    client.put_object(Bucket=bucket, Key="run/stack/../../outside", Body=b"hostile")
    run = fetched_model(f"s3://{bucket}/run", tmp_path, never)
    manifest = verified_manifest(run)
    assert manifest is not None
    fetched = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert fetched == {MANIFEST, *PREDICTION_FILES} - {"model/embedder.safetensors"}  # its ViT began with random weights
    assert not (tmp_path / "outside").exists()
    (run / "stack" / "stack.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"stack\.json differs from manifest\.json"):
        verified_manifest(run)


def test_a_named_pipe_that_nobody_writes_to_can_be_stopped(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        list(Sounds([str(tmp_path / "pipe")], tmp_path, lambda: next(asked)))
