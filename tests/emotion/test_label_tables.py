"""The tables of EmoMusic and PMEmo as they are published, beside DEAM's (test_deam.py)."""

from pathlib import Path

import pytest

from emotion.data import unused as reasons
from emotion.data.layouts import dataset_files, find_dataset
from emotion.data.songs import Dataset
from emotion.data.unused import Unused
from emotion.errors import DataError

EMOMUSIC = "song_id,mean_arousal,std_arousal,mean_valence,std_valence\n2,3.1,0.99443,3,0.66667\n3,3.5,1.8409,9,1.7029\n"
SONGS_INFO = (
    "song_id,file_name,Artist,Song title,start of the segment (min.sec),end of the segment (min.sec),Genre,Mediaeval 2013 set\n"
    "2,2.mp3,\tThe New Mystikal Troubadours,\tBurn,0.05,0.5,Blues,development\n"
    "3,3.mp3,the new mystikal troubadours,Two,0.05,0.5,Blues,evaluation\n"
)
PMEMO = "musicId,Arousal(mean),Valence(mean)\n1,0.4,0.575\n4,0,1\n"
PMEMO_DEVIATIONS = "musicId,Arousal(std),Valence(std)\n1,0.3,0.25\n4,0,0.5\n"
METADATA = (
    "musicId,fileName,title,artist,album,duration,chorus_start_time,chorus_end_time\n1,1.mp3,Good Drank,2 Chainz,x,30,0:1,0:2\n"
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def emomusic(root: Path, table: str = EMOMUSIC) -> Path:
    clips = {f"clips_45seconds/{number}.mp3": "" for number in (2, 3, 5)}
    annotations = {"annotations/static_annotations.csv": table, "annotations/songs_info.csv": SONGS_INFO}
    return write(root, {**clips, **annotations, "annotations/arousal_cont_average.csv": "song_id,sample_15000ms\n2,0.1\n"})


def pmemo(root: Path, table: str = PMEMO, deviations: str = PMEMO_DEVIATIONS) -> Path:
    clips = {f"PMEmo2019/chorus/{number}.mp3": "" for number in (1, 4, 5)}
    annotations = {f"PMEmo2019/annotations/{name}": text for name, text in (("static_annotations.csv", table),)}
    if deviations:
        annotations["PMEmo2019/annotations/static_annotations_std.csv"] = deviations
    dynamic = {"PMEmo2019/annotations/dynamic_annotations.csv": "musicId,frameTime,Arousal(mean),Valence(mean)\n1,15.0,0.1,0.2\n"}
    return write(root, {**clips, **annotations, **dynamic, "PMEmo2019/metadata.csv": METADATA})


def found(root: Path, unused: Unused | None = None) -> Dataset:
    unused = Unused() if unused is None else unused
    return find_dataset(root, dataset_files(root, unused), unused, None)


def test_emomusic_is_read_with_deviations_and_artists(tmp_path: Path) -> None:
    unused = Unused()
    dataset = found(emomusic(tmp_path), unused)
    first, second = dataset.songs
    assert (first.song_id, first.valence, first.valence_sd) == (2, -0.5, 0.66667 / 4)
    assert (first.arousal, first.arousal_sd) == pytest.approx((-0.475, 0.2486075))
    assert (second.valence, second.audio) == (1, "clips_45seconds/3.mp3")
    assert first.group == second.group == "the new mystikal troubadours"
    assert dataset.scale == (1, 9)
    # A quarter of its 1,000 clips have no label.
    assert (dataset.faults, unused.examples[reasons.UNLABELLED]) == ([], ["clips_45seconds/5.mp3"])


def test_pmemo_is_read_on_its_own_scale(tmp_path: Path) -> None:
    unused = Unused()
    dataset = found(pmemo(tmp_path), unused)
    first, second = dataset.songs
    assert (first.song_id, first.group, first.audio) == (1, "2 chainz", "PMEmo2019/chorus/1.mp3")
    assert (first.valence, first.arousal) == pytest.approx((0.15, -0.2))
    assert (first.valence_sd, first.arousal_sd) == (0.5, 0.6)
    assert (second.valence, second.arousal, second.valence_sd, second.arousal_sd) == (1, -1, 1, 0)
    assert dataset.scale == (0, 1)
    assert (dataset.faults, unused.examples[reasons.UNLABELLED]) == ([], ["PMEmo2019/chorus/5.mp3"])


def test_pmemo_without_its_second_table_has_no_deviations(tmp_path: Path) -> None:
    assert {(song.valence_sd, song.arousal_sd) for song in found(pmemo(tmp_path, deviations="")).songs} == {(None, None)}
    (tmp_path / "PMEmo2019/annotations/static_annotations_std.csv").write_text("musicId,Arousal(std),Valence(std)\n4,0.1,0.2\n")
    assert [song.valence_sd for song in found(tmp_path).songs] == [None, 0.4]


@pytest.mark.parametrize(
    ("table", "deviations", "place", "says"),
    [
        (
            PMEMO.replace("0.575", "1.5"),
            PMEMO_DEVIATIONS,
            "static_annotations.csv, line 2",
            "valence(mean) is '1.5', expected 0 to 1",
        ),
        (
            PMEMO.replace("0.4", "nan"),
            PMEMO_DEVIATIONS,
            "static_annotations.csv, line 2",
            "arousal(mean) is 'nan', expected 0 to 1",
        ),
        (
            PMEMO,
            PMEMO_DEVIATIONS.replace("0.3", "-1"),
            "static_annotations_std.csv, line 2",
            "arousal(std) is '-1', expected 0 or more",
        ),
    ],
)
def test_a_wrong_number_of_pmemo_is_a_fault_of_its_song(
    tmp_path: Path, table: str, deviations: str, place: str, says: str
) -> None:
    dataset = found(pmemo(tmp_path, table, deviations))
    assert [song.song_id for song in dataset.songs] == [4]
    assert [(fault.song_id, fault.place) for fault in dataset.faults] == [(1, f"PMEmo2019/annotations/{place}")]
    assert says in dataset.faults[0].what


def test_a_label_without_its_clip_is_a_fault(tmp_path: Path) -> None:
    root = emomusic(tmp_path)
    (root / "clips_45seconds/3.mp3").unlink()
    assert [(fault.kind, fault.song_id) for fault in found(root).faults] == [("label without audio", 3)]


def test_a_table_of_another_kind_is_named_by_the_columns_that_it_lacks(tmp_path: Path) -> None:
    write(tmp_path, {"static_annotations.csv": "song,mood\n1,2\n", "1.mp3": ""})
    (fault,) = found(tmp_path).faults
    assert (fault.kind, fault.place) == ("label file", "static_annotations.csv")
    assert "expected one column each of song_id, valence_mean" in fault.what


def test_without_any_label_table_the_message_names_all_layouts(tmp_path: Path) -> None:
    write(tmp_path, {"1.mp3": ""})
    with pytest.raises(
        DataError, match=r"songs\.csv in this folder, .*; or put there DEAM's .*, or static_annotations\.csv of EmoMusic or PMEmo"
    ):
        found(tmp_path)
