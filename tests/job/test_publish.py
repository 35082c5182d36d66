"""Two machines that publish one run at one time."""

import json
from pathlib import Path

import pytest

from emotion.errors import ModelError
from emotion.files import sha256_of, write_json
from job.results.publish import copy_run, unlike_manifest
from job.storage.local_folder import LocalFolder


def made_run(folder: Path, log: str, model: str = "weights") -> Path:
    for name, text in {"model/model.safetensors": model, "logs/job.log": log, "metrics.json": "{}"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    artifacts = {name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}
    write_json(folder / "manifest.json", {"artifacts": artifacts})
    return folder


@pytest.mark.parametrize("already_sent", [0, 1, 2, 3])
def test_the_slower_of_two_finds_the_other_ones_run_and_leaves_it_whole(tmp_path: Path, already_sent: int) -> None:
    ours, theirs = made_run(tmp_path / "ours", "our log"), made_run(tmp_path / "theirs", "their longer log")
    place = LocalFolder(tmp_path / "published" / "run")
    asked = 0

    def meanwhile() -> bool:
        nonlocal asked
        if asked == already_sent:
            copy_run(theirs, place, lambda: False)
        asked += 1
        return False

    copy_run(ours, place, meanwhile)
    assert unlike_manifest(place, verify=True) is None
    log = "their longer log" if already_sent < 3 else "our log"
    assert (place.path / "logs" / "job.log").read_text() == log


def test_another_result_of_the_same_run_is_never_written_over(tmp_path: Path) -> None:
    place = LocalFolder(tmp_path / "published")
    copy_run(made_run(tmp_path / "one", "log"), place, lambda: False)
    with pytest.raises(ModelError, match=r"holds another result of this spec \(model/model\.safetensors differs\)"):
        copy_run(made_run(tmp_path / "other", "log", "other"), place, lambda: False)
    (place.path / "metrics.json").write_text("[]")
    with pytest.raises(ModelError, match=r"metrics\.json is not what its manifest says"):
        copy_run(made_run(tmp_path / "again", "log"), place, lambda: False)
    assert json.loads((place.path / "manifest.json").read_text())["artifacts"]
