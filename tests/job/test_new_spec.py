"""`emotion-job init`: what it writes passes `check`, and says what lies in the folder."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from emotion import proc
from emotion.data.label_scale import Scale
from emotion.data.toy_dataset import generate_dataset
from emotion.errors import DataError, SpecError
from job.arguments import PRESETS
from job.pipeline import new_spec
from job.pipeline.facts import checked, planned
from job.pipeline.folders import job_folders, make_folders
from job.pipeline.new_spec import make_spec
from job.spec.load import load_spec

Rows = Callable[..., Path]


@pytest.fixture(autouse=True)
def without_probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The probe takes seconds; a test of its own has it."""
    monkeypatch.setattr(new_spec, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def songs(tmp_path: Path) -> Rows:
    """songs("a.wav,2,3,Ann", …) is a folder with these files and their table."""

    def make(*rows: str, header: str = "file,valence,arousal,group") -> Path:
        folder = tmp_path / "My Songs (2026)"
        folder.mkdir()
        for number, row in enumerate(rows):
            soundfile.write(folder / row.split(",")[0], np.full(8000, 0.1 * number), 8000)
        (folder / "songs.csv").write_text("\n".join([header, *rows]) + "\n")
        return folder

    return make


def rows(count: int, groups: int) -> list[str]:
    return [f"{number}.wav,{1 + number % 8},{8 - number % 7},artist {number % groups}" for number in range(count)]


def test_a_table_of_songs_becomes_a_spec_that_passes_check(songs: Rows, tmp_path: Path) -> None:
    folder = songs(*rows(20, 10))
    said = make_spec(str(folder), (1, 9), None)
    path = tmp_path / "my-songs-2026.yaml"
    found = checked(path, ())
    assert found.error is None
    spec = load_spec(path)
    assert (spec.name, spec.data.source, spec.data.scale, spec.data.faults) == ("my-songs-2026", str(folder), (1, 9), "fail")
    assert (spec.split.protocol, spec.split.folds, spec.split.grouped, spec.vit.model) == ("kfold", 5, True, "test_vit")
    assert "20 songs, songs.csv, ratings on 1..9, 10 groups" in said
    assert "\nexpected for each of 5 folds: about " in said
    assert "\nfolds: without --set split.fold=1 to --set split.fold=4 a run computes fold 0 alone; " in said
    assert "--work" not in path.read_text(), "a file has no options"
    assert said.endswith("next: emotion-job check my-songs-2026.yaml, then emotion-job run my-songs-2026.yaml")
    text = path.read_text()
    assert "# " + said.splitlines()[0] in text
    assert all("  # " in line for line in text.splitlines() if line.startswith("  "))


def test_nothing_is_overwritten(songs: Rows, tmp_path: Path) -> None:
    folder = songs(*rows(20, 10))
    (tmp_path / "my-songs-2026.yaml").write_text("mine")
    (tmp_path / "link.yaml").symlink_to("nowhere")
    for out in (None, tmp_path / "link.yaml"):
        with pytest.raises(SpecError, match="exists, and init overwrites nothing"):
            make_spec(str(folder), (1, 9), out)
    assert (tmp_path / "my-songs-2026.yaml").read_text() == "mine"
    make_spec(str(folder), (1, 9), tmp_path / "other.yaml")
    assert checked(tmp_path / "other.yaml", ()).error is None


def test_a_scale_is_asked_for_with_the_range_of_the_numbers(songs: Rows, tmp_path: Path) -> None:
    folder = songs("a.wav,2.5,30,x", "b.wav,7,88,y")
    with pytest.raises(SpecError, match=r"--scale: the numbers in .*songs\.csv run from 2\.5 to 88, .*--scale 1 9"):
        make_spec(str(folder), None, None)
    with pytest.raises(SpecError, match=r"--scale: expected the lowest rating and then a higher one, found 9\.\.1"):
        make_spec(str(folder), (9, 1), None)
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.parametrize(("count", "groups", "folds", "grouped"), [(12, 3, 3, True), (8, 4, 4, True), (16, 1, 5, False)])
def test_there_are_as_many_folds_as_groups_can_fill(count: int, groups: int, folds: int, grouped: bool, songs: Rows) -> None:
    said = make_spec(str(songs(*rows(count, groups))), (1, 9), Path("x.yaml"))
    split = load_spec(Path("x.yaml")).split
    assert (split.folds, split.grouped) == (folds, grouped)
    assert f"for each of {folds} folds" in said


def test_a_split_of_the_dataset_is_used(songs: Rows) -> None:
    splits = ["train"] * 5 + ["validation"] * 2 + ["test"] * 3
    table = [f"{number}.wav,{1 + number % 8},4,{split}" for number, split in enumerate(splits)]
    make_spec(str(songs(*table, header="file,valence,arousal,split")), (1, 9), Path("x.yaml"))
    assert load_spec(Path("x.yaml")).split.protocol == "column"


@pytest.mark.parametrize(
    ("below", "name", "option"), [("", "mine", "../work"), ("deeper", "mine", "../../work"), ("", "work", "../runs")]
)
def test_inside_the_dataset_the_run_command_names_a_folder_beside_it(
    songs: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str, name: str, option: str
) -> None:
    folder = songs(*rows(20, 10)).rename(tmp_path / name)
    (folder / below).mkdir(exist_ok=True)
    monkeypatch.chdir(folder / below)
    said = make_spec(str(folder), (1, 9), Path("x.yaml"))
    assert said.endswith(f"then emotion-job run x.yaml --work {option}")
    assert f"#   emotion-job run x.yaml --work {option}\n" in Path("x.yaml").read_text()
    spec = load_spec(Path("x.yaml"))
    make_folders(spec, job_folders(Path(option), None))
    assert (tmp_path / Path(option).name).is_dir()
    inside = job_folders(Path("work"), None)
    refusal = rf"--work: {inside.work} lies inside data\.source {folder}\. Name a folder outside"
    with pytest.raises(SpecError, match=refusal):
        planned(spec, inside)


def test_few_faults_are_left_out_and_many_are_refused(songs: Rows, tmp_path: Path) -> None:
    folder = songs(*rows(25, 10))
    (folder / "3.wav").unlink()
    said = make_spec(str(folder), (1, 9), Path("x.yaml"))
    assert "left out: 1 song with faults" in said
    assert load_spec(Path("x.yaml")).data.faults == "drop"
    assert checked(Path("x.yaml"), ()).error is None
    for number in range(4, 9):
        (folder / f"{number}.wav").unlink()
    with pytest.raises(DataError, match="6 of 25 songs cannot be used") as error:
        make_spec(str(folder), (1, 9), Path("y.yaml"))
    assert "data." not in str(error.value), "there is no spec yet"
    assert str(error.value).endswith("\nAt most 1 song may be left out. Correct the others, and call init again.")
    assert not Path("y.yaml").exists()


def test_a_scale_that_most_ratings_are_outside_of_is_asked_about(songs: Rows) -> None:
    folder = songs(*rows(20, 10))
    outside = sum(1 + number % 8 > 5 or 8 - number % 7 > 5 for number in range(20))
    assert outside > 10
    with pytest.raises(DataError) as error:
        make_spec(str(folder), (1, 5), None)
    said = str(error.value)
    assert said.startswith(f"data: {outside} of 20 songs cannot be used")
    assert "songs.csv, line 2: arousal is '8', expected 1..5 (--scale)" in said
    assert said.endswith(f"\n{outside} songs have ratings outside of --scale 1 5. Is that the scale of the raters?")
    assert "data." not in said


def test_words_in_place_of_ratings_are_no_matter_of_the_scale(songs: Rows) -> None:
    folder = songs(*(f"{number}.wav,happy,calm,x" for number in range(8)))
    with pytest.raises(DataError, match="8 of 8 songs cannot be used") as error:
        make_spec(str(folder), (1, 9), None)
    assert "of the raters" not in str(error.value)


@pytest.mark.parametrize(("scale", "warned"), [((1, 100), True), ((1, 17), True), ((1, 15), False), ((1, 9), False)])
def test_ratings_that_use_a_small_part_of_the_scale_get_a_warning(songs: Rows, scale: Scale, warned: bool) -> None:
    said = make_spec(str(songs(*rows(20, 10))), scale, Path("x.yaml"))
    warning = f"warning: the ratings run from 1 to 8, less than half of --scale 1 {scale[1]:g}. Is the scale right?"
    assert (warning in said.splitlines()) == warned
    assert ("warning: " in said) == warned


def test_too_few_songs_for_a_split_ask_for_songs_alone(songs: Rows) -> None:
    with pytest.raises(DataError, match=r"^6 songs in 3 groups are too few .* Add songs with labels\.$"):
        make_spec(str(songs(*rows(6, 3))), (1, 9), None)


@pytest.mark.parametrize("scale", [None, (1, 9)])
@pytest.mark.parametrize("table", ["", "Songs.csv", "sub/songs.csv"])
def test_audio_without_a_table_of_labels_asks_for_one(songs: Rows, table: str, scale: Scale | None) -> None:
    folder = songs(*rows(20, 10))
    (folder / "sub").mkdir()
    (folder / "0.wav").rename(folder / "a song.wav")  # which is no id, as in the layout of DEAM
    (folder / "songs.csv").rename(folder / (table or "sub/songs.txt"))
    with pytest.raises(DataError, match=r"no label file .* Write songs\.csv .* file,valence,arousal .*, group, ") as error:
        make_spec(str(folder), scale, None)
    said = str(error.value)
    assert "rename them" not in said
    assert "--scale" not in said
    assert said.endswith(
        f"songs.csv, in lower case, in the dataset's folder itself (1: {table})." if table else "or name another folder."
    )


def test_deams_layout_needs_no_scale_and_a_gpu_gets_deams_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_dataset(tmp_path / "DEAM", 12, 0, lambda: False)
    said = make_spec(str(tmp_path / "DEAM"), None, None)
    assert "12 songs, in the layout of DEAM, ratings on 1..9" in said
    assert checked(Path("deam.yaml"), ()).error is None
    with pytest.raises(SpecError, match="have a scale of their own"):
        make_spec(str(tmp_path / "DEAM"), (1, 9), Path("x.yaml"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(proc, "DEVICE_FILES", tmp_path)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(new_spec, "SONGS_FOR_DEAMS_RECIPE", 12)
    make_spec(str(tmp_path / "DEAM"), None, Path("gpu.yaml"))
    assert load_spec(Path("gpu.yaml")).vit.model == "vit_small_patch16_224"
    assert checked(Path("gpu.yaml"), ()).error is None


def test_excerpts_of_deam_keep_the_length_that_the_preset_requires(tmp_path: Path, songs: Rows) -> None:
    generate_dataset(tmp_path / "DEAM", 12, 0, lambda: False)
    make_spec(str(tmp_path / "DEAM"), None, Path("deam.yaml"), "deam")
    assert load_spec(Path("deam.yaml")).data.excerpt_seconds == 45
    make_spec(str(songs(*rows(20, 10))), (1, 9), Path("others.yaml"), "deam")
    assert load_spec(Path("others.yaml")).data.excerpt_seconds is None


def test_the_preset_can_be_named(songs: Rows) -> None:
    folder = songs(*rows(20, 10))
    specs = Path(str(new_spec.__file__)).parent.parent / "specs"
    assert {path.stem for path in specs.glob("*.yaml")} == {*PRESETS, "demo"}
    for preset in PRESETS:
        make_spec(str(folder), (1, 9), Path(f"{preset}.yaml"), preset)
        assert f"from the preset {preset}. Every key" in Path(f"{preset}.yaml").read_text()
        assert checked(Path(f"{preset}.yaml"), ()).error is None
        assert load_spec(Path(f"{preset}.yaml")).gan == load_spec(specs / f"{preset}.yaml").gan


@pytest.mark.full
def test_the_memory_is_that_of_the_probe(songs: Rows, emotion_job: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    found = emotion_job("init", songs(*rows(20, 10)), "--scale", "1", "9", CUDA_VISIBLE_DEVICES="")
    assert found.returncode == 0, found.stderr
    assert re.search(r"memory: about \d+ MiB \(tensors of a step: GAN \d+ MiB, ViT \d+ MiB; the rest is Python", found.stdout)
