import errno
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from emotion import errors
from emotion.audio.feature_store import FeatureWriter
from emotion.config import MelConfig
from emotion.data.songs import SongLabels
from emotion.errors import AccessError, StorageError, counted, printable
from emotion.files import append_json_line, write_bytes, written_atomically


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    assert errors.__doc__ is not None
    written = re.findall(r"(\w+) +(\d\d) +(yes|no)\b", errors.__doc__)
    found = [
        (name, str(kind.exit_code), "yes" if kind.retry_helps else "no")
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.EmotionError | errors.Interrupted)
    ]
    assert sorted(written) == sorted(found)


@pytest.fixture
def at_most_a_megabyte() -> Iterator[None]:
    """The limit holds for the output of pytest, too, so it is larger than that."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def write_atomically(path: Path) -> None:
    write_bytes(path, bytes(2 << 20))


def append(path: Path) -> None:
    append_json_line(path, {"text": "x" * (2 << 20)})


def write_features(path: Path) -> None:
    with FeatureWriter(path.parent, MelConfig()) as writer:
        song = SongLabels(song_id=1, valence=0, arousal=0, valence_sd=0, arousal_sd=0, group="1")
        writer.append(song, np.zeros((1 << 15, MelConfig().mels), np.float16))


def write_short_songs(path: Path) -> None:
    """Of which the last fails with some of its bytes still to be written when the file is closed."""
    with FeatureWriter(path.parent, MelConfig()) as writer:
        song = SongLabels(song_id=1, valence=0, arousal=0, valence_sd=0, arousal_sd=0, group="1")
        for _ in range(1 << 13):
            writer.append(song, np.zeros((1, MelConfig().mels), np.float16))


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (write_atomically, "file"),
        (append, "file"),
        (write_features, ".features.f16.part"),
        (write_short_songs, ".features.f16.part"),
    ],
)
@pytest.mark.usefixtures("at_most_a_megabyte")
def test_an_error_of_writing_names_the_file_and_the_limit(write: Callable[[Path], None], named: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large") as caught:
        write(tmp_path / "file")
    expected = f"{tmp_path / named}: File too large: this process may write files of 1048576 bytes at most; see ulimit -f"
    assert str(StorageError.of(caught.value)) == expected


def test_an_error_of_a_connection_is_not_one_of_the_file_that_was_being_written(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError) as caught:
        errors_of_a_connection(tmp_path / "file")
    assert caught.value.filename is None


def errors_of_a_connection(path: Path) -> None:
    with written_atomically(path):
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


def test_the_failures_of_a_copied_tree_are_one_line_with_the_first_of_them(tmp_path: Path) -> None:
    (tmp_path / "from" / "inner").mkdir(parents=True)
    (tmp_path / "from" / "inner" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(shutil.Error) as caught:
        shutil.copytree(tmp_path / "from", tmp_path / "to")
    source, target = tmp_path / "from" / "inner" / "gone", tmp_path / "to" / "inner" / "gone"
    assert str(StorageError.of(caught.value)) == f"{source} to {target}: No such file or directory"


def test_a_copied_tree_that_may_not_be_read_is_denied_access() -> None:
    error = shutil.Error([("a", "b", "[Errno 13] Permission denied: 'a'"), ("c", "d", "[Errno 28] No space left on device")])
    assert isinstance(StorageError.of(error), AccessError)
    assert str(StorageError.of(error)) == "a to b: Permission denied"


def test_a_quota_is_not_a_full_disk() -> None:
    error = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/data/step-3.ckpt")
    assert str(StorageError.of(error)).startswith("/data/step-3.ckpt: Disk quota exceeded: the quota of this user")


def test_too_many_open_files_names_the_limit() -> None:
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/data/2.mp3")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    expected = f"/data/2.mp3: Too many open files: this process may open {limit}; see ulimit -n"
    assert str(StorageError.of(error)) == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Für Elise ☂ 𝄞.mp3", "Für Elise ☂ 𝄞.mp3"),
        ("a\tb\nc\rd", r"a\tb\nc\rd"),
        ("\x1b[2J\x07\x7f\x9b", r"\x1b[2J\x07\x7f\x9b"),
        ("line\u2028end\u202egnp.exe\u00a0\u200b", r"line\u2028end\u202egnp.exe\xa0\u200b"),
        (Path(os.fsdecode(b"caf\xe9.mp3")), r"caf\udce9.mp3"),
        ("", ""),
    ],
)
def test_what_does_not_print_is_escaped(text: object, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files", "x.mp3"), errors.LimitError, "ulimit -n"),
        (RuntimeError("can't start new thread"), errors.LimitError, "no more threads"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), errors.LimitError, "no more threads"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), errors.LimitError, "out of memory"),
        (MemoryError(), errors.LimitError, "out of memory: MemoryError"),
        (RuntimeError("\nstd::bad_alloc"), errors.LimitError, "out of memory: std::bad_alloc"),
        (ImportError("libx.so: failed to map segment from shared object"), errors.LimitError, "out of memory: libx.so"),
        (
            ImportError("libx.so.1: cannot open shared object file: No such file"),
            errors.LimitError,
            "a library cannot be loaded: libx",
        ),
        (OSError("Could not find/load shared object file 'libllvmlite.so'"), errors.LimitError, "a library cannot be loaded"),
        (OSError(errno.ENOSPC, "No space left on device", "a.ckpt"), errors.StorageError, "a.ckpt: No space"),
        (PermissionError(errno.EACCES, "Permission denied", "a.ckpt"), errors.AccessError, "a.ckpt: Permission"),
        (KeyError("x"), errors.EmotionError, "an unexpected error, KeyError: 'x'"),
        (errors.DataError("as it is"), errors.DataError, "as it is"),
    ],
)
def test_what_the_user_is_told_of_an_exception(error: Exception, kind: type[Exception], said: str) -> None:
    failure = errors.as_failure(error)
    assert type(failure) is kind
    assert said in str(failure)


def test_a_variable_that_a_library_refuses_when_it_is_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_NCOLS", "wide")
    code = """
from emotion.errors import as_failure
try:
    import tqdm
except ValueError as error:
    print(repr(as_failure(error)))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith(
        "SpecError(\"TQDM_NCOLS in the environment is 'wide', which a library refuses: invalid literal for int()"
    )
    # The same words later are not of an import.
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - Python's own words
        int("wide")
    assert type(errors.as_failure(caught.value)) is errors.EmotionError


@pytest.mark.parametrize(
    ("raised", "named"),
    [
        ("ValueError('Invalid log settings: loud, expected a list')", "TORCH_LOGS"),
        ("ValueError(\"invalid literal for int() with base 10: '1.5'\")", "TQDM_NCOLS"),
        ("ValueError('cannot reshape array of size 2 into shape (1,3,1)')", None),  # though HF_HUB_OFFLINE is 1
        ("ValueError('hidden is no name of a colour')", None),  # though HF_TOKEN is hidden, which nobody may read
        ("RuntimeError('loud is not supported')", None),
    ],
)
def test_only_a_variable_that_a_message_is_about_is_blamed(
    raised: str, named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hidden", "TORCH_LOGS": "loud", "TQDM_NCOLS": "1.5"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "library.py").write_text(f"raise {raised}")
    try:
        runpy.run_path(str(tmp_path / "library.py"))
    except (ValueError, RuntimeError) as error:
        failure = errors.as_failure(error)
    assert type(failure) is (errors.EmotionError if named is None else errors.SpecError)
    assert str(failure).startswith("an unexpected error" if named is None else f"{named} in the environment")


def test_one_is_singular() -> None:
    assert [counted(number, "song") for number in (0, 1, 2)] == ["0 songs", "1 song", "2 songs"]
