import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from emotion.config import Section
from emotion.errors import SpecError
from job.spec.load import load_spec
from job.spec.model import JobSpec, fingerprint, run_name, schema, to_yaml
from job.spec.overrides import with_environment_values
from tests.conftest import section_of

SMALLEST = "name: deam\ndata: {source: /data/deam}\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # Relative, so that the tests can write what messages begin with.
    return Path("s.yaml")


def loaded(file: Path, text: str, *overrides: str) -> JobSpec:
    file.write_text(text, encoding="utf-8")
    return load_spec(file, overrides)


def problems(file: Path, text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        loaded(file, text, *overrides)
    return caught.value.problems


def test_the_smallest_spec_has_a_name_and_a_source(file: Path) -> None:
    spec = loaded(file, SMALLEST)
    assert spec == JobSpec.model_validate({"name": "deam", "data": {"source": "/data/deam"}})
    assert spec.gan.epochs == 150


def test_every_problem_is_reported_at_once_with_its_position(file: Path) -> None:
    text = """\
# A spec with eight faults.
name: My Run
data:
  origin: /data/deam
gan:
  epocs: 3
  batch_size: ten
  batch_size: 48
vit:
  warmup_fraction: 1.5
  epochs: .inf
  channels: 2
split: {folds: 5, fold: 9}
"""
    assert problems(file, text) == (
        "s.yaml:2:1: name: expected 1 to 40 lower-case letters, digits and hyphens, the first not a hyphen, found 'My Run'",
        "s.yaml:3:1: data.source: missing, expected text: folder with audio and songs.csv, or DEAM, EmoMusic or PMEmo; "
        "file://…, s3://BUCKET/PREFIX; generated:N: N generated songs",
        "s.yaml:4:3: data.origin: unknown key, allowed here: source, copy, manifest, scale, faults, drop_at_most, "
        "shortest_seconds, longest_seconds, excerpt_seconds, silence_db, largest_peak",
        "s.yaml:6:3: gan.epocs: unknown key; did you mean gan.epochs?",
        "s.yaml:7:3: gan.batch_size: expected a whole number of at least 1, found 'ten'",
        "s.yaml:8:3: the key 'batch_size' a second time, once is allowed; first at 7:3",
        "s.yaml:10:3: vit.warmup_fraction: expected a number from 0 to 1, found 1.5",
        "s.yaml:11:11: .inf is refused, only finite numbers are allowed",
        "s.yaml:12:3: vit.channels: expected 1 or 3, found 2",
        "s.yaml:13:1: split: fold is 9, but with 5 folds it must be 0 to 4",
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("seed: -1", "s.yaml:3:1: seed: expected a whole number of at least 0, found -1"),
        ("seed: 1.0", "s.yaml:3:1: seed: expected a whole number of at least 0, found 1.0"),
        ("seed: yes", "s.yaml:3:1: seed: expected a whole number of at least 0, found 'yes'"),
        ("gan: {epochs: 0}", "s.yaml:3:7: gan.epochs: expected a number above 0, found 0"),
        ("gan: {epochs: '30'}", "s.yaml:3:7: gan.epochs: expected a number above 0, found '30'"),
        ("gan: {epochs: true}", "s.yaml:3:7: gan.epochs: expected a number above 0, found true"),
        ("gan: {epochs: {a: 1}}", 's.yaml:3:7: gan.epochs: expected a number above 0, found {"a": 1}'),
        ("gan: {batch_size: 1, matching_weight: 1}", "s.yaml:3:1: gan: matching_weight 1 takes labels of other songs of a batch"),
        ("vit: {drop_path: 1}", "s.yaml:3:7: vit.drop_path: expected a number of at least 0 and below 1, found 1"),
        ("gan: {micro_batch: 0}", "s.yaml:3:7: gan.micro_batch: expected a whole number of at least 1, or null, found 0"),
        ("device: {deterministic: no}", "s.yaml:3:10: device.deterministic: expected true or false, or null, found 'no'"),
        ("device: {kind: gpu}", "s.yaml:3:10: device.kind: expected auto, cpu or cuda, found 'gpu'"),
        ("vit: {model: 16}", "s.yaml:3:7: vit.model: expected text, found 16; put it in quotes"),
        ("gan:", "s.yaml:3:1: gan: expected keys (epochs, "),
        ("gan: 5", "s.yaml:3:1: gan: expected keys (epochs, "),
        ("gan: epochs:2", "s.yaml:3:1: gan: expected keys (epochs, "),
        ("seed:", "s.yaml:3:1: seed: expected a whole number of at least 0, found nothing; leave the key out"),
        ("synth: {samples: [[0, 2]]}", "s.yaml:3:23: synth.samples[0][1]: expected a number from -1 to 1, found 2"),
        ("synth: {samples: [[0]]}", "s.yaml:3:19: synth.samples[0]: expected a list of 2, each a number from -1 to 1,"),
        ("synth: {samples: [[0, 0, 0]]}", "s.yaml:3:19: synth.samples[0]: expected a list of 2, each a number from -1"),
        ("synth: {samples: x}", "s.yaml:3:9: synth.samples: expected a list of at most 64, each a list of 2, each a"),
        ("width: 3", "s.yaml:3:1: width: unknown key; did you mean gan.width?"),
        ("epochs: 3", "s.yaml:3:1: epochs: unknown key; did you mean gan.epochs or vit.epochs?"),
        ("mel: {latent: 3}", "s.yaml:3:7: mel.latent: unknown key; did you mean gan.latent?"),
        ("presicion: fp32", "s.yaml:3:1: presicion: unknown key; did you mean precision?"),
        ("zzz: 1", "s.yaml:3:1: zzz: unknown key, allowed here: name, seed, precision, data, "),
        ("g\u0430n: {width: 3}", "s.yaml:3:1: g\u0430n: unknown key with U+0430 (CYRILLIC SMALL LETTER A); did you mean gan?"),
        ("seed: \u22121", "s.yaml:3:1: seed: expected a whole number of at least 0, found '\u22121' with U+2212 (MINUS SIGN)"),
        (
            "seed: '1\u00a0'",
            "s.yaml:3:1: seed: expected a whole number of at least 0, found '1\\xa0' with U+00A0 (NO-BREAK SPACE)",
        ),
        ("quality: {'a b\\n': 1}", "s.yaml:3:11: quality.'a b\\\\n': unknown key, allowed here: components"),
        ("gan: {width: 3}}", "s.yaml:3:16: not valid YAML"),
    ],
)
def test_a_problem_is_described_in_plain_words(file: Path, line: str, problem: str) -> None:
    (found,) = problems(file, f"{SMALLEST}{line}\n")
    assert found.startswith(problem)
    assert "\n" not in found


@pytest.mark.parametrize("name", ["a", "0", "deam-fold-0", "a" * 40, "no"])
def test_a_name_is_a_folder_name(file: Path, name: str) -> None:
    assert loaded(file, f"name: '{name}'\ndata: {{source: x}}").name == name


@pytest.mark.parametrize("name", ["", "-a", "A", "a" * 41, "a b", "a_b", "../a", "a\\n", "ä"])
def test_another_name_is_refused(file: Path, name: str) -> None:
    (found,) = problems(file, f'name: "{name}"\ndata: {{source: x}}')
    assert found.startswith("s.yaml:1:1: name: expected 1 to 40 lower-case letters, digits and hyphens")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}", "null"])
def test_an_empty_file_lacks_what_has_no_default(file: Path, text: str) -> None:
    assert [problem.split(",")[0] for problem in problems(file, text)] == [
        "s.yaml:1:1: name: missing",
        "s.yaml:1:1: data: missing",
    ]


@pytest.mark.parametrize("text", ["[1, 2]", "spec", "3"])
def test_a_file_without_a_mapping_is_one_problem(file: Path, text: str) -> None:
    (found,) = problems(file, text)
    assert found.startswith("s.yaml:1:1: expected keys (name, seed, ")


def test_a_refused_value_causes_no_second_problem(file: Path) -> None:
    text = "name: *x\ndata: &d {source: 5}\nsplit: {fold: !!int 7}\ngan: {clip_seconds: .inf}"
    assert [problem.split(" ")[0] for problem in problems(file, text)] == [
        "s.yaml:1:7:",
        "s.yaml:2:7:",
        "s.yaml:3:15:",
        "s.yaml:4:21:",
    ]


def test_a_file_that_cannot_be_read_is_one_line(file: Path, tmp_path: Path) -> None:
    for path, reason in [
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path, "a folder"),
        (Path("/dev/zero"), "1:1: more than 256 KiB"),
    ]:
        with pytest.raises(SpecError) as caught:
            load_spec(path)
        assert len(caught.value.problems) == 1
        assert reason in str(caught.value)
    file.write_text("")
    with pytest.raises(SpecError, match="cannot be read, Not a directory"):
        load_spec(file / "x")


def test_overrides_replace_and_add_values_and_the_last_one_counts(file: Path) -> None:
    text = f"{SMALLEST}gan: {{epochs: 3, micro_batch: 4}}\nsplit: {{fold: 1}}\n"
    spec = loaded(
        file,
        text,
        "gan.epochs=2",
        "gan.micro_batch=null",
        "vit.image_size=[224,224]",
        "seed=1",
        "seed=2",
        "split={protocol: holdout}",
        "split.seed=3",
        "name=no",
    )
    assert (spec.gan.epochs, spec.gan.micro_batch, spec.vit.image_size, spec.seed) == (2, None, (224, 224), 2)
    assert (spec.split.protocol, spec.split.fold, spec.split.seed, spec.name) == ("holdout", 0, 3, "no")


def test_an_override_can_set_a_key_that_the_file_lacks(file: Path) -> None:
    assert loaded(file, "name: a\ngan:\n", "data.source=/x", "gan.epochs=2").data.source == "/x"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("gan.epochs=ten", "--set gan.epochs=ten: gan.epochs: expected a number above 0, found 'ten'"),
        ("gan.epocs=2", "--set gan.epocs=2: gan.epocs: unknown key; did you mean gan.epochs?"),
        ("epochs=2", "--set epochs=2: epochs: unknown key; did you mean gan.epochs or vit.epochs?"),
        ("gan.epochs.x=2", '--set gan.epochs.x=2: gan.epochs: expected a number above 0, found {"x": 2}'),
        ("name.x=2", "--set name.x=2: name is 'deam', which has no keys; set all of it"),
        ("gan.epochs", "--set gan.epochs: expected KEY=VALUE, such as gan.epochs=2"),
        ("gan..epochs=2", "--set gan..epochs=2: expected KEY=VALUE, such as gan.epochs=2"),
        ("=2", "--set =2: expected KEY=VALUE, such as gan.epochs=2"),
        ("gan.\udcff=2", "--set gan.\\udcff=2: expected KEY=VALUE, such as gan.epochs=2"),
        ("gan.epochs=.nan", "--set gan.epochs=.nan: .nan is refused, only finite numbers are allowed"),
        ("gan.epochs=[", "--set gan.epochs=[: not valid YAML"),
        ("data.source=", "--set data.source=: data.source: expected text, found nothing"),
        ("split.fold=7", "--set split.fold=7: split: fold is 7, but with 5 folds it must be 0 to 4"),
        ("data.source=generated:5", "--set data.source=generated:5: data.source: expected generated:N with N from 12 to"),
        ("vit.clip_seconds=20", "--set vit.clip_seconds=20: gan.clip_seconds: a synthetic clip"),
    ],
)
def test_a_problem_of_an_override_names_the_override(file: Path, override: str, problem: str) -> None:
    (found,) = problems(file, f"{SMALLEST}gan: {{clip_seconds: 10}}", override)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    "override",
    [
        "notify.webhook=https://hooks.example.com/T0/HUSH",
        "notify.webhook=hooks.example.com/T0/HUSH",
        "notify.webhook=https://hooks.example.com/?key=HUSH\udcff",
        "notify={webhook: hooks.example.com/T0/HUSH}",
        "notify.webhook=[https://hooks.example.com/T0/HUSH]",
        "notify=https://HUSH@hooks.example.com/T0/HUSH",
        "notify.webhok=https://hooks.example.com/HUSH",
    ],
)
def test_the_url_of_a_webhook_is_not_repeated(file: Path, override: str) -> None:
    assert "HUSH" not in "".join(problems(file, SMALLEST, override))
    assert "HUSH" not in "".join(problems(file, f"{SMALLEST}notify: ['https://hooks.example.com/T0/HUSH']\n"))
    with pytest.raises(SpecError, match="not UTF-8") as raised:
        with_environment_values([f"{override}\udcff"])
    assert "HUSH" not in str(raised.value)


def test_of_another_address_the_host_is_shown(file: Path) -> None:
    (found,) = problems(file, SMALLEST, "seed=https://example.org/HUSH")
    assert (
        found
        == "--set seed=https://example.org/***: seed: expected a whole number of at least 0, found 'https://example.org/***'"
    )


def test_an_override_is_not_blamed_for_a_problem_of_the_file(file: Path) -> None:
    assert problems(file, f"{SMALLEST}split: {{fold: 7}}\n", "split.seed=3", "gan.width=0") == (
        "s.yaml:3:1: split: fold is 7, but with 5 folds it must be 0 to 4",
        "--set gan.width=0: gan.width: expected a whole number of at least 4, found 0",
    )


@pytest.mark.parametrize(
    ("gan", "vit", "fits"),
    [
        ("{}", "{}", True),
        ("{clip_seconds: 5}", "{clip_seconds: 5}", True),
        ("{clip_seconds: 12}", "{clip_seconds: 5}", True),
        ("{clip_seconds: 5}", "{}", False),
        ("{}", "{clip_seconds: 12}", False),
        ("{clip_seconds: 5}", "{synthetic_share: 0}", True),
    ],
)
def test_a_synthetic_clip_must_fill_a_crop(file: Path, gan: str, vit: str, fits: bool) -> None:
    text = f"{SMALLEST}gan: {gan}\nvit: {vit}\n"
    if fits:
        loaded(file, text)
    else:
        (found,) = problems(file, text)
        assert "gan.clip_seconds" in found
        assert "vit.clip_seconds" in found
        assert found.startswith("s.yaml:3:7: gan" if "clip" in gan else "s.yaml:4:7: vit")


def test_a_short_synthetic_clip_is_found_where_vit_is_left_out_and_other_sections_are_wrong(file: Path) -> None:
    found = problems(file, f"{SMALLEST}gan: {{clip_seconds: 5}}\nseed: x\n")
    assert [problem.split(" ")[:2] for problem in found] == [["s.yaml:3:7:", "gan.clip_seconds:"], ["s.yaml:4:1:", "seed:"]]


@pytest.mark.parametrize("source", ["generated:12", "generated:60", "generated:1000"])
def test_a_source_of_generated_songs_is_not_a_path(file: Path, source: str) -> None:
    assert loaded(file, f"name: a\ndata: {{source: {source}}}").data.source == source


@pytest.mark.parametrize(
    "source", ["generated:11", "generated:1001", "generated:", "generated:x", "generated:-60", "generated:060",
               "generated:" + "9" * 5000, "generated:٦٠", "generated:60.0", "generated:1e2"]
)  # fmt: skip
def test_a_number_of_generated_songs_out_of_range_is_refused(file: Path, source: str) -> None:
    (found,) = problems(file, f"name: a\ndata: {{source: '{source}'}}")
    assert found.startswith("s.yaml:2:8: data.source: expected generated:N with N from 12 to 1000, found 'generated:")
    assert len(found) < 200


def test_paths_become_absolute_and_keywords_stay(file: Path, tmp_path: Path) -> None:
    def resolved(text: str) -> list[str | None]:
        settings = f"split: {{protocol: lists, lists: '{text}'}}\nartifacts: {{destination: '{text}'}}"
        spec = loaded(file, f"name: a\ndata: {{source: '{text}'}}\nvit: {{weights: '{text}'}}\n{settings}")
        return [spec.data.source, spec.split.lists, spec.vit.weights, spec.artifacts.destination]

    for text, path in [
        ("/data/deam", "/data/deam"),
        ("/data/deam/", "/data/deam"),
        ("file:///data/deam", "/data/deam"),
        ("data/deam", f"{tmp_path}/data/deam"),
        ("./deam", f"{tmp_path}/deam"),
        ("../deam", f"{tmp_path.parent}/deam"),
        ("~/deam", f"{tmp_path}/home/deam"),
        ("deam.safetensors", f"{tmp_path}/deam.safetensors"),
        ("deam.pth", f"{tmp_path}/deam.pth"),
    ]:
        assert resolved(text) == [path] * 4
    for word in ("pretrained", "random", "vit_base_patch16_224.augreg_in21k"):
        assert resolved(word) == [f"{tmp_path}/{word}", f"{tmp_path}/{word}", word, f"{tmp_path}/{word}"]


def test_a_symbolic_link_keeps_its_name_unless_the_path_goes_up_from_it(file: Path, tmp_path: Path) -> None:
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there" / "deep")
    assert loaded(file, "name: a\ndata: {source: link/x}").data.source == f"{tmp_path}/link/x"
    assert loaded(file, "name: a\ndata: {source: link/../x}").data.source == f"{tmp_path}/there/x"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ftp://bucket/x", "ftp:// is not supported here; use a path"),
        ("https://host/x.pth", "https:// is not supported here; use "),
        ("file://host/x", "expected a path after file://, as in file:///data/deam, found 'file://host/x'"),
        ("~nobody-of-this-name/x", "the path '~nobody-of-this-name/x' cannot be resolved"),
        ("file:/data/deam", "expected a path after file://, as in file:///data/deam, found 'file:/data/deam'"),
        ("file:////host/x", "expected a path after file://"),
        ("file:///data/my%20music", "'file:///data/my%20music' has %20, which is not decoded"),
        ("server:/data/deam", "server:/ is not supported here; use a path"),
        ("$HOME/DEAM", "'$HOME/DEAM' has $HOME, which is not replaced; write the path out, or, for a key of a spec,"),
        ("/scratch/${USER}/DEAM", "'/scratch/${USER}/DEAM' has ${USER}, which is not replaced"),
        ("/data/deam$VERSION", "'/data/deam$VERSION' has $VERSION, which is not replaced"),
        ("file:///data/$USER", "'/data/$USER' has $USER, which is not replaced"),
        ("/data/$(whoami)/x", "'/data/$(whoami)/x' has $(whoami), which is not replaced"),
        ("/data/`id`/x", "'/data/`id`/x' has `id`, which is not replaced"),
        ("%USERPROFILE%/DEAM", "'%USERPROFILE%/DEAM' has %USERPROFILE%, which is not replaced"),
        ("C:\\data/DEAM", "'C:\\\\data/DEAM' is a Windows path"),
        ("D:/DEAM", "'D:/DEAM' is a Windows path"),
        ("\\\\server\\x/DEAM", "'\\\\\\\\server\\\\x/DEAM' is a Windows path"),
        ('"/data/DEAM"', "'\"/data/DEAM\"' has quotes that would be part of the name; remove them"),
        (
            "\u201c/data/DEAM\u201d",
            "'\u201c/data/DEAM\u201d' with U+201C (LEFT DOUBLE QUOTATION MARK) and U+201D (RIGHT DOUBLE QUOTATION MARK) has quo",
        ),
        ("/data/DEAM ", "'/data/DEAM ' begins or ends with a blank; remove it"),
        (" /data/DEAM", "' /data/DEAM' begins or ends with a blank; remove it"),
        ("/data/DEAM\u00a0", "'/data/DEAM\\xa0' with U+00A0 (NO-BREAK SPACE) begins or ends with a blank; remove it"),
    ],
)
def test_an_unsupported_address_is_refused_for_each_key(file: Path, text: str, problem: str) -> None:
    places = f"split: {{protocol: lists, lists: '{text}'}}\nvit: {{weights: '{text}'}}\nartifacts: {{destination: '{text}'}}"
    found = problems(file, f"name: a\ndata: {{source: '{text}'}}\n{places}")
    keys = ["2:8: data.source", "3:26: split.lists", "4:7: vit.weights", "5:13: artifacts.destination"]
    assert [one.startswith(f"s.yaml:{key}: {problem}") for one, key in zip(found, keys, strict=True)] == [True] * 4


@pytest.mark.parametrize(
    "path", ["/data/100 %/x", "/data/a%20b", "/data/M%C3%BAsica", "/data/a: b", "/data/5$", "/data/it's", "/a\\b"]
)
def test_a_path_that_is_only_unusual_is_read_as_it_is(file: Path, path: str) -> None:
    assert loaded(file, f"name: a\ndata: {{source: {json.dumps(path)}}}").data.source == path


def test_a_variable_in_a_current_folder_s_name_is_refused_when_the_spec_is_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = file.parent / "$HOME"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (problem,) = problems(file.absolute(), "name: a\ndata: {source: deam}")
    assert "$HOME, which is not replaced" in problem


ACCESS_POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint/songs"
IN_A_STORE = (
    "data.source",
    "data.manifest",
    "artifacts.destination",
    "checkpoint.mirror",
    "vit.weights",
    "vit.teacher",
    "init_from.run",
)


def test_a_variable_in_an_s3_location_is_refused(file: Path) -> None:
    for key in IN_A_STORE:
        (found,) = problems(file, f"{SMALLEST}", f"{key}=s3://bucket/$USER/x")
        assert f"{key}: 's3://bucket/$USER/x' has $USER, which is not replaced" in found


@pytest.mark.parametrize("key", IN_A_STORE)
def test_an_s3_location_has_no_slash_at_its_end(file: Path, key: str) -> None:
    section, name = key.split(".")
    for text, found in [
        ("s3://bucket/x/", "s3://bucket/x"),
        ("s3://my.old_Bucket/a b/ü.pth", "s3://my.old_Bucket/a b/ü.pth"),
        ("s3://bucket", "s3://bucket"),
        ("S3://bucket/x", "s3://bucket/x"),
        ("s3://bucket/a//b", "s3://bucket/a//b"),
        ("s3://bucket/#1 what?/@x", "s3://bucket/#1 what?/@x"),
        (f"s3://{ACCESS_POINT}/a/b/", f"s3://{ACCESS_POINT}/a/b"),
        ("s3://songs--euw1-az1--x-s3/x", "s3://songs--euw1-az1--x-s3/x"),
    ]:
        spec = loaded(file, SMALLEST, f"{key}={json.dumps(text)}")
        assert getattr(getattr(spec, section), name) == found
        assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("s3:///x", "found '', which is not a valid bucket name"),
        ("s3://b/x", "found 'b', which is not a valid"),
        ("s3://bucket/a/../b", "expected names other than . and .. after the bucket, and no control characters, found 'a/../b'"),
        ("s3://bucket//b", "expected one slash after the bucket, found '/b'"),
        ("s3://key:hush@bucket/b", "no user, password or signature"),
        ("s3://bucket/b?X-Amz-Signature=hush", "no user, password or signature"),
        ("s3://bucket/b?versionId=1&AWSAccessKeyId=hush", "no user, password or signature"),
        ("s3:/bucket/b", "expected s3://BUCKET/PREFIX, found 's3:/bucket/b'"),
        ("arn:aws:s3:::bucket/b", "expected s3://BUCKET/PREFIX"),
        ("s3://arn:aws:s3:::bucket/b", "expected the ARN of an access point in one region"),
        ("s3://arn:aws:s3::123456789012:accesspoint/several.mrap/b", "expected the ARN of an access point in one region"),
    ],
)
def test_a_malformed_s3_location_is_refused_for_each_key_without_repeating_a_secret(file: Path, text: str, problem: str) -> None:
    for key in IN_A_STORE:
        (found,) = problems(file, SMALLEST, f"{key}={text}")
        assert f"{key}: expected" in found
        assert problem in found
        assert "hush" not in found.partition(f"{key}: ")[2]
    (found,) = problems(file, f"{SMALLEST}split: {{protocol: lists, lists: 's3://bucket/x'}}")
    assert "split.lists: s3:// is not supported here; use a path" in found


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (
            "gs://bucket/b",
            "gs:// is not supported here; use s3://BUCKET/PREFIX, with the service's address in storage.endpoint_url",
        ),
        ("az://bucket/b", "Azure has no S3 interface"),
        ("ABFSS://box@account.dfs.core.windows.net/b", "Azure has no S3 interface"),
        ("s3a://bucket/b", "write s3://BUCKET/PREFIX"),
        ("https://bucket.s3.eu-west-1.amazonaws.com/a/b?X-Amz-Signature=hush", "write 's3://bucket/a/b'"),
        ("https://s3.amazonaws.com/bucket/a%20b", "write 's3://bucket/a b'"),
        ("https://my.bucket.s3-us-west-2.amazonaws.com/", "write 's3://my.bucket'"),
        ("https://storage.googleapis.com/bucket/b", "HMAC keys"),
        ("https://box.blob.core.windows.net/b?sig=hush", "Azure has no S3 interface"),
        ("https://hush@example.org/DEAM.zip", "download other files to a folder first"),
        ("http://[", "download other files to a folder first"),
        ("ftp://example.org/b", "ftp:// is not supported here; use a path"),
    ],
)
def test_a_location_elsewhere_is_refused_with_what_to_write_instead(file: Path, text: str, advice: str) -> None:
    for key in ("data.source", "artifacts.destination"):
        (found,) = problems(file, SMALLEST, f"{key}={text}")
        assert advice in found
        assert "hush" not in found.partition(f"{key}: ")[2]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://store.example", "expected https://"),
        ("store.example", "expected https://HOST"),
        ("https://user:hush@store.example", "without user, password or query"),
        ("http://169.254.169.254", "link-local"),
        ("https://[fe80::1]:9000", "link-local"),
    ],
)
def test_an_endpoint_that_credentials_must_not_be_sent_to_is_refused(file: Path, url: str, problem: str) -> None:
    (found,) = problems(file, f"{SMALLEST}storage: {{endpoint_url: '{url}'}}")
    assert problem in found
    for good in ("https://store.example:9000/", "http://127.0.0.1:9000", "http://localhost:1", "http://[::1]:9"):
        spec = loaded(file, f"{SMALLEST}storage: {{endpoint_url: '{good}'}}")
        assert spec.storage.endpoint_url == good.rstrip("/")


def test_a_warm_start_needs_a_run_and_a_part_that_starts_from_it(file: Path, tmp_path: Path) -> None:
    for text, path in [("runs/a", f"{tmp_path}/runs/a"), ("file:///runs/a", "/runs/a"), ("~/a", f"{tmp_path}/home/a")]:
        spec = loaded(file, f"{SMALLEST}init_from: {{run: '{text}', vit: false}}")
        assert spec.init_from is not None
        assert spec.init_from.run == path
        assert load_spec(file, ["init_from.gan=false", "init_from.vit=true"]).init_from != spec.init_from
    for line, problem in [
        ("{run: gs://bucket/a}", "13: init_from.run: gs:// is not supported here; use s3://BUCKET/PREFIX"),
        ("{gan: true}", "1: init_from.run: missing, expected text: a published run to start from"),
        ("{run: a, gann: true}", "21: init_from.gann: unknown key; did you mean init_from.gan?"),
        ("{run: }", "13: init_from.run: expected text, found nothing"),
        ("{run: a, gan: false, vit: false}", "1: init_from: gan and vit are both false, so nothing starts from the run"),
        ("a", "1: init_from: expected keys (run, gan, vit, normalisation), found 'a'"),
    ]:
        (found,) = problems(file, f"{SMALLEST}init_from: {line}")
        assert found.startswith(f"s.yaml:3:{problem}")
        assert "leave the key out" not in found


@pytest.mark.parametrize(
    ("vit", "problem", "remedy"),
    [
        (  # A resolved spec has the default written out.
            "{weights: random}",
            "vit.weights: the ViT would start from 'random' and from the run in init_from;",
            "vit.weights=pretrained",
        ),
        (
            "{epochs: 0, synthetic_share: 0}",
            "vit.epochs: 0 is only a linear probe, but a ViT of an earlier run keeps its head;",
            "vit.epochs=1",
        ),
    ],
    ids=["weights", "epochs"],
)
def test_a_warm_started_vit_has_no_other_weights_and_is_no_probe(file: Path, vit: str, problem: str, remedy: str) -> None:
    text = f"{SMALLEST}init_from: {{run: a}}\nvit: {vit}\n"
    (found,) = problems(file, text)
    assert found.startswith(f"s.yaml:4:7: {problem}")
    loaded(file, text, "init_from.vit=false")
    loaded(file, text, remedy)


def test_a_spec_without_a_warm_start_has_no_init_from_in_its_fingerprint(file: Path) -> None:
    spec = loaded(file, SMALLEST)
    assert "init_from" not in spec.result_fields()
    assert loaded(file, f"{SMALLEST}init_from: null\n") == spec
    assert fingerprint(loaded(file, f"{SMALLEST}init_from: {{run: a}}\n")) != fingerprint(spec)


def test_an_empty_path_is_not_the_current_folder(file: Path) -> None:
    for text in ("data: {source: ''}", "data: {source: ' '}", "data: {source: x}\nartifacts: {destination: ''}"):
        assert len(problems(file, f"name: a\n{text}")) == 1


def test_a_key_without_a_blank_behind_its_colon_is_explained(file: Path) -> None:
    (problem,) = problems(file, f"{SMALLEST}gan:\n  epochs:2\n")
    assert problem.endswith("found 'epochs:2'; a blank has to follow the ':' of a key")


def test_a_fingerprint_depends_on_values_not_on_how_they_are_written(file: Path) -> None:
    written = loaded(file, f"{SMALLEST}gan: {{epochs: 30, latent: 8}}\nseed: 1\n")
    again = """
seed: 1   # as ever
gan:
  latent: 0x8
  epochs: 3.0e+1
data:
  "source": file:///data/deam/
name: 'deam'
"""
    assert fingerprint(loaded(file, again)) == fingerprint(written)
    assert fingerprint(loaded(file, again, "gan.epochs=30.0")) == fingerprint(written)
    assert fingerprint(JobSpec.model_validate(json.loads(written.model_dump_json()), strict=False)) == fingerprint(written)
    assert fingerprint(loaded(file, again, "gan.epochs=31")) != fingerprint(written)
    assert run_name(written) == f"deam-{fingerprint(written)[:12]}"
    assert len(fingerprint(written)) == 64


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every dotted key of the spec and whether it is marked as saying where."""
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.")
        else:
            extra = field.json_schema_extra
            yield prefix + (field.alias or name), bool(isinstance(extra, dict) and extra.get("runtime"))


def changed(dotted: str) -> Iterator[tuple[JobSpec, JobSpec]]:
    """Pairs of valid specs that differ in one key alone."""
    *section, key = dotted.split(".")
    whole: dict[str, Any] = {"name": "a", "data": {"source": "/x"}}
    if section == ["init_from"]:
        whole["init_from"] = {"run": "/x"}
    if key == "teacher_weight":
        whole["vit"] = {"teacher": "/t.npz"}
    lists = {**whole, "split": {"protocol": "lists", "lists": "/lists"}}
    final = {**whole, "split": {"protocol": "all", "out_of_fold": "/out_of_fold.json"}}
    for start in (whole, lists, final):
        one = json.loads(JobSpec.model_validate(start).model_dump_json())
        holder = one[section[0]] if section else one
        before = holder[key]
        candidates: list[Any] = [
            True,
            False,
            "b",
            "/b",
            1,
            3,
            [224, 224],
            [1.0, 5.0],
            [[0.5, 0.5]],
            "cpu",
            "holdout",
            "other",
            "fp32",
            "drop",
            "aws",
            "new",
            "always",
            "auto",
            "https://store.example",
            ["mail", "me"],
            None,
        ]
        if isinstance(before, int | float) and not isinstance(before, bool):
            candidates = [before + 1, before * 0.5 + 0.01, before * 1.5, 1, 3]
        for candidate in candidates:
            holder[key] = before
            base = JobSpec.model_validate_json(json.dumps(one))
            holder[key] = candidate
            try:
                other = JobSpec.model_validate_json(json.dumps(one))
            except ValidationError:
                continue
            if other != base:
                yield base, other


@pytest.mark.parametrize(("key", "says_where"), list(fields(JobSpec)))
def test_every_field_but_the_runtime_fields_is_in_the_fingerprint(key: str, says_where: bool) -> None:
    pairs = list(changed(key))
    assert pairs, "no other valid value among the candidates"
    for base, other in pairs:
        assert (fingerprint(base) == fingerprint(other)) == says_where


def test_a_resolved_spec_loads_into_an_equal_one_from_anywhere(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
name: '2024'
data: {source: "./odd: name # 1e-4 é\\n\\"'\\\\.d"}
precision: bf16
split: {protocol: lists, lists: 1e-4}
gan: {generator_learning_rate: 1e-7, epochs: 1e22, micro_batch: 3}
synth: {samples: [[1e-9, -1], [0, 1]]}
vit: {image_size: [224, 448], weights: 'null', model: '0o17', channels: 3}
device: {threads: 2, deterministic: true}
artifacts: {destination: ~/out}
""".replace("lists: 1e-4", "lists: '1e-4'")
    spec = loaded(file, text)
    copy = tmp_path / "resolved.yaml"
    copy.write_text(to_yaml(spec), encoding="utf-8")
    monkeypatch.chdir("/")
    assert load_spec(copy) == spec
    assert to_yaml(load_spec(copy)) == to_yaml(spec)
    assert run_name(load_spec(copy)) == run_name(spec)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\u2028\u2029\ufeff\ufffe\uffff")),
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)
def test_any_text_and_any_number_survive_the_round_trip(file: Path, model: str, rate: float) -> None:
    start = JobSpec.model_validate(
        {"name": "a", "data": {"source": "/x"}, "vit": {"model": model, "learning_rate": rate}, "gan": {"epochs": rate}}
    )
    assert loaded(file, to_yaml(start)) == start


def test_a_resolved_spec_means_the_same_to_other_yaml_readers(file: Path) -> None:
    spec = loaded(file, "name: no\ndata: {source: /1e-4}\ngan: {epochs: 1e-5}\nvit: {model: '12:30:45', weights: '010'}\n")
    text = to_yaml(spec)
    assert yaml.safe_load(text) == json.loads(spec.model_dump_json())
    assert list(yaml.safe_load(text)) == list(JobSpec.model_fields)


def test_the_schema_describes_every_key_and_refuses_others() -> None:
    described = schema()
    assert described["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert described["title"] == "emotion-job spec"
    assert described["required"] == ["name", "data"]
    assert list(described["properties"]) == list(JobSpec.model_fields)
    sections = [described, *described["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)
    json.dumps(described, allow_nan=False)


def test_the_spec_is_read_without_anything_heavy() -> None:
    code = """
import sys
import job.spec.model
heavy = {"torch", "numpy", "scipy", "librosa", "timm", "soundfile", "matplotlib", "boto3"}
print(sorted(heavy & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([key for key, _ in fields(JobSpec)] + ["gan", "data", "zzz", "gan.zzz"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_value_under_any_key_gives_a_spec_or_a_spec_error(file: Path, path: str, value: Any) -> None:
    try:
        loaded(file, SMALLEST, f"{path}={json.dumps(value)}")
    except SpecError as error:
        refused = error.problems
        assert refused
