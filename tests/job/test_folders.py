from pathlib import Path

import pytest

from emotion.errors import SpecError, StorageError
from job.pipeline.folders import JobFolders, job_folders, make_folders
from job.spec.load import load_spec
from tests.conftest import TINY


def test_folders_are_absolute_and_home_is_found_where_no_shell_has_done_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert job_folders(Path("work"), None).scratch == tmp_path / "work" / "scratch"
    assert job_folders(Path("~/work"), Path("/local")).work == Path("/home/me/work")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("$WORK/runs", "'$WORK/runs' has $WORK, which is not replaced"),
        ("s3://bucket/work", "s3:/ is not supported here; use a path"),
    ],
)
def test_what_is_no_path_of_this_machine_is_refused_and_names_the_option(text: str, problem: str) -> None:
    with pytest.raises(SpecError, match=r"^--work: ") as caught:
        job_folders(Path(text), None)
    assert problem in str(caught.value)
    with pytest.raises(SpecError, match=r"^--scratch: "):
        job_folders(Path("/work"), Path(text))


@pytest.mark.parametrize(("make", "error"), [("a file", SpecError), ("a link to nothing", StorageError)])
def test_what_is_in_the_way_of_publishing_in_work_is_told_before_anything_is_made(
    tmp_path: Path, make: str, error: type[Exception]
) -> None:
    folders = JobFolders(tmp_path / "work", tmp_path / "scratch")
    folders.work.mkdir()
    published = folders.work / "published"
    if make == "a file":
        published.touch()
    else:
        published.symlink_to(tmp_path / "unmounted")
    with pytest.raises(error, match=rf"^published in --work: .*{published} is {make.replace('to nothing', 'to')}"):
        make_folders(load_spec(TINY), folders)
    assert list(folders.work.iterdir()) == [published]
    assert not folders.scratch.exists()
