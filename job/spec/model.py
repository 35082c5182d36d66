"""The spec: what a job is to do. Loaded from YAML, checked whole, resolved, fingerprinted; nothing heavy is imported.

A resolved spec says everything: every default is written out and every path is absolute, so it means the same anywhere.
"""

import copy
import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from emotion.config import (
    ArtifactsConfig,
    CheckpointConfig,
    DataConfig,
    DeviceConfig,
    EvaluateConfig,
    GanConfig,
    InitConfig,
    MelConfig,
    Precision,
    PreemptionConfig,
    QualityConfig,
    Section,
    SplitConfig,
    StorageConfig,
    SynthConfig,
    VitConfig,
)
from emotion.errors import SpecError
from emotion.files import digest_of
from job.spec import strict_yaml
from job.spec.strict_yaml import KeyPath, Value, shortened

AnySection = TypeVar("AnySection", bound=Section)

GENERATED = "generated:"
S3 = "s3://"
BUCKET = r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,62}"
"""Amazon allows less today; old buckets and other stores have such names."""
FEWEST_GENERATED, MOST_GENERATED = 12, 1000


def _refusal(text: str, *keys: str) -> PydanticCustomError:
    """A problem of the dotted `keys`, the one to change first."""
    return PydanticCustomError("spec", "{text}", {"text": text, "keys": keys})


class JobSpec(Section):
    """What a job is to do. To construct one is to resolve it: relative paths start at the current folder."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,39}$",
        description="1 to 40 lower-case letters, digits and hyphens, the first not a hyphen",
    )
    seed: int = Field(0, ge=0, description="everything random follows from it, except the split, which has its own")
    precision: Precision = Field("auto", description="auto takes the fastest that the device does well")
    data: DataConfig
    split: SplitConfig = Field(default_factory=SplitConfig)
    mel: MelConfig = Field(default_factory=MelConfig)
    init_from: InitConfig | None = None
    gan: GanConfig = Field(default_factory=GanConfig)
    synth: SynthConfig = Field(default_factory=SynthConfig)
    quality: QualityConfig = Field(default_factory=QualityConfig)
    # Checked as a default too: a shorter gan.clip_seconds can be wrong for it.
    vit: VitConfig = Field(default_factory=VitConfig, validate_default=True)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    device: DeviceConfig = Field(default_factory=DeviceConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    preemption: PreemptionConfig = Field(default_factory=PreemptionConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)
    artifacts: ArtifactsConfig = Field(default_factory=ArtifactsConfig)

    def what(self) -> dict[str, Any]:
        found = super().what()
        # A spec that starts from nothing has the keys that it had before it could say so.
        if self.init_from is None:
            del found["init_from"]
        return found

    # Field validators rather than one for the whole spec: they run, and report, whatever is wrong with other sections.

    @field_validator("data")
    @classmethod
    def _source_known(cls, data: DataConfig) -> DataConfig:
        data = _with_location(data, "data", "manifest")
        if not data.source.startswith(GENERATED):
            return _with_location(data, "data", "source")
        songs = data.source.removeprefix(GENERATED)
        if not re.fullmatch("[1-9][0-9]{0,3}", songs) or not FEWEST_GENERATED <= int(songs) <= MOST_GENERATED:
            expected = f"expected {GENERATED}N with N from {FEWEST_GENERATED} to {MOST_GENERATED}"
            raise _refusal(f"{expected}, found {_shown(data.source)}", "data.source")
        return data

    @field_validator("split")
    @classmethod
    def _lists_absolute(cls, split: SplitConfig) -> SplitConfig:
        return _with_absolute_path(split, "split", "lists")

    @field_validator("init_from")
    @classmethod
    def _run_absolute(cls, init: InitConfig | None) -> InitConfig | None:
        return None if init is None else _with_location(init, "init_from", "run")

    @field_validator("artifacts")
    @classmethod
    def _destination_absolute(cls, artifacts: ArtifactsConfig) -> ArtifactsConfig:
        return _with_location(artifacts, "artifacts", "destination")

    @field_validator("checkpoint")
    @classmethod
    def _mirror_absolute(cls, checkpoint: CheckpointConfig) -> CheckpointConfig:
        return _with_location(checkpoint, "checkpoint", "mirror")

    @field_validator("vit")
    @classmethod
    def _weights_absolute(cls, vit: VitConfig) -> VitConfig:
        text = vit.weights
        # Anything else is a word or one of timm's tags, such as vit_base_patch16_224.augreg_in21k.
        is_path = "/" in text or text.startswith((".", "~")) or text.endswith((".safetensors", ".pth"))
        return _with_location(vit, "vit", "weights") if is_path else vit

    @field_validator("vit")
    @classmethod
    def _weights_from_one_place(cls, vit: VitConfig, info: ValidationInfo) -> VitConfig:
        init = info.data.get("init_from")
        if init is None or not init.vit or vit.weights == VitConfig.model_fields["weights"].default:
            return vit
        raise _refusal(
            f"the ViT would start from {_shown(vit.weights)} and from the run in init_from; leave vit.weights out (its default "
            f"counts as that), or set init_from.vit to false",
            "vit.weights",
            "init_from.vit",
        )

    @field_validator("vit")
    @classmethod
    def _synthetic_clips_fill_a_crop(cls, vit: VitConfig, info: ValidationInfo) -> VitConfig:
        gan = info.data.get("gan")
        if gan is None or vit.synthetic_share == 0 or gan.clip_seconds >= vit.clip_seconds:
            return vit
        keys = ["gan.clip_seconds", "vit.clip_seconds", "vit.synthetic_share"]
        if "clip_seconds" not in gan.model_fields_set:
            keys[:2] = keys[1::-1]
        raise _refusal(
            f"a synthetic clip (gan.clip_seconds {gan.clip_seconds:g}) is shorter than a crop (vit.clip_seconds "
            f"{vit.clip_seconds:g}) and would be repeated; make gan.clip_seconds at least as long, or "
            f"vit.synthetic_share 0",
            *keys,
        )


def load_spec(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """The resolved spec of a YAML file with `overrides` such as "gan.epochs=2" put in; the last one of a key wins.

    Raises SpecError with every problem found: `FILE:LINE:COLUMN: key: what was found, what is allowed`, or with
    `--set gan.epochs=2` as the place where an override is the cause. Two kinds wait for a second look: what follows a
    YAML syntax error, and what is checked across keys of which one is wrong by itself.
    """
    return load_document(path, JobSpec, "spec", overrides)


def load_document(path: Path, model: type[AnySection], kind: str, overrides: Sequence[str] = ()) -> AnySection:
    """What a YAML file says, as a section; read, checked and told as a spec is. kind: what such a file is called."""
    document = strict_yaml.read(_content(path, kind), str(path))
    found = [(p.line, p.column, f"{path}:{p.line}:{p.column}: {p.text}") for p in document.problems]
    hidden = [p.hides for p in document.problems if p.hides is not None]
    in_file: Value = {} if document.value is None else document.value

    value = copy.deepcopy(in_file)
    labels: list[tuple[KeyPath, str]] = []
    from_overrides: list[str] = []
    for override in overrides:
        dotted, _, text = override.partition("=")
        keys, label = tuple(dotted.strip().split(".")), f"--set {override}"
        try:
            if "=" not in override or not all(re.fullmatch(r"[\w-]+", key) for key in keys):
                raise SpecError(f"{label}: expected KEY=VALUE, such as gan.epochs=2")
            _put(value, keys, strict_yaml.scalar_or_flow(text, label), label)
            labels.append((keys, label))
        except SpecError as error:
            from_overrides.extend(error.problems)
            hidden.append(keys)

    found_section, problems = _checked(value, model)
    without_overrides = {p.text for p in _checked(in_file, model)[1]} if problems and labels else set()
    for problem in problems:
        if any(_related(place, other) for place in problem.places for other in hidden):
            continue
        causes = [label for keys, label in labels if any(_related(place, keys) for place in problem.places)]
        if causes and problem.text not in without_overrides:
            from_overrides.append(f"{causes[-1]}: {problem.text}")
            continue
        known = [place for place in problem.places if place in document.positions]
        line, column = document.position((known or problem.places)[0])
        found.append((line, column, f"{path}:{line}:{column}: {problem.text}"))
    if found or from_overrides or found_section is None:
        raise SpecError(*(text for _, _, text in sorted(found, key=lambda one: one[:2])), *from_overrides)
    return found_section


def spec_of(value: Value) -> JobSpec:
    """The spec that a JSON value says, such as the one in a manifest. Raises SpecError with every problem found."""
    spec, problems = _checked(value, JobSpec)
    if spec is None:
        raise SpecError(*(problem.text for problem in problems))
    return spec


def fingerprint(spec: JobSpec) -> str:
    """Hex SHA-256 of what the spec computes: all its values but those that only say where."""
    return digest_of(spec.what())


def run_name(spec: JobSpec) -> str:
    """NAME-KEY12, the folder of the run and of what it publishes."""
    return f"{spec.name}-{fingerprint(spec)[:12]}"


def to_yaml(spec: JobSpec) -> str:
    """The resolved spec, every default written out. `load_spec`, and any other YAML reader, gets equal values back."""
    lines: list[str] = []
    for key in type(spec).model_fields:
        value = getattr(spec, key)
        if isinstance(value, Section):
            lines.append(f"{key}:")
            fields = type(value).model_fields.items()
            lines.extend(f"  {field.alias or name}: {_written(getattr(value, name))}" for name, field in fields)
        else:
            lines.append(f"{key}: {_written(value)}")
    return "\n".join(lines) + "\n"


def schema() -> dict[str, Any]:
    """JSON Schema of the spec, for editors."""
    described = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described, "title": "emotion-job spec"}


def _written(value: object) -> str:
    """A value as both YAML 1.1 and 1.2 read it: every text in quotes, every exponent after a decimal point."""
    if isinstance(value, tuple):
        return f"[{', '.join(_written(item) for item in value)}]"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    return json.dumps(value, ensure_ascii=False)


def _with_absolute_path(section: AnySection, name: str, key: str) -> AnySection:
    return _with_location(section, name, key, _absolute_path)


def _with_location(
    section: AnySection, name: str, key: str, resolved: Callable[[str], str] | None = None
) -> AnySection:
    text = getattr(section, key)
    if text is None:
        return section
    try:
        return section.model_copy(update={key: (resolved or _location)(text)})
    except ValueError as error:
        raise _refusal(str(error), f"{name}.{key}") from None


def _location(text: str) -> str:
    """`s3://BUCKET/PREFIX` without a slash at the end, or an absolute path. Raises ValueError."""
    if not text.startswith(S3):
        return _absolute_path(text)
    bucket, *names = text.removeprefix(S3).rstrip("/").split("/")
    if "@" in bucket or "?" in text or "#" in text:
        raise ValueError("expected s3://BUCKET/PREFIX and nothing else: no user, password, query or fragment")
    if not re.fullmatch(BUCKET, bucket):
        raise ValueError(f"expected s3://BUCKET/PREFIX, found the bucket {_shown(bucket)}, which no bucket is called")
    if any(name in ("", ".", "..") for name in names) or not text.isprintable():
        raise ValueError(f"expected names between single slashes after the bucket, found {_shown('/'.join(names))}")
    return "/".join((S3 + bucket, *names))


def _absolute_path(text: str) -> str:
    """`file:///x` means the path /x, character by character; `~` is the home folder. Raises ValueError."""
    scheme = re.match("[A-Za-z][A-Za-z0-9+.-]*://", text)
    if scheme and scheme[0] != "file://":
        raise ValueError(f"{scheme[0]} is not supported here; use a path")
    if scheme and not text.startswith("file:///"):
        raise ValueError(f"expected a path after file://, as in file:///data/deam, found {_shown(text)}")
    text = text.removeprefix("file://")
    if not text.strip():
        raise ValueError("expected a path, found an empty text")
    try:
        path = Path(text).expanduser().absolute()
        # Only the file system knows where ".." leads from a symbolic link; other links keep their name.
        return str(path.resolve() if ".." in path.parts else path)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"the path {_shown(text)} leads nowhere: {error}") from None


def _content(path: Path, kind: str) -> bytes:
    try:
        with path.open("rb") as file:
            # One byte more than is allowed is enough to know that it is too long, and /dev/zero ends too.
            return file.read(strict_yaml.MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file, expected a {kind} in YAML; check the path") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: a folder, expected a {kind} in YAML; name a file in it") from None
    except PermissionError:
        raise SpecError(
            f"{path}: no permission to read it, expected a {kind} in YAML; check its owner and mode"
        ) from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read, {error.strerror}; expected a {kind} in YAML") from None


def _put(value: Value, keys: tuple[str, ...], new: Value, label: str) -> None:
    for depth, key in enumerate(keys):
        if not isinstance(value, dict):
            where = ".".join(keys[:depth]) or "the spec"
            raise SpecError(f"{label}: {where} is {_shown(value)}, which has no keys; set all of it")
        if depth == len(keys) - 1:
            value[key] = new
            return
        if value.get(key) is None:
            value[key] = {}
        value = value[key]


def _related(one: KeyPath, other: KeyPath) -> bool:
    """Whether one path leads to the other or through it."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


@dataclass(frozen=True)
class _Problem:
    """A complaint and the keys that can be its cause, the likeliest first."""

    places: tuple[KeyPath, ...]
    text: str


def _checked(value: Value, model: type[AnySection]) -> tuple[AnySection | None, list[_Problem]]:
    try:
        # As JSON, because pydantic's strict mode takes a JSON list for a tuple but not a Python one.
        return model.model_validate_json(json.dumps(value)), []
    except ValidationError as error:
        described = model.model_json_schema()
        problems = [_problem(detail, described) for detail in error.errors(include_url=False)]
        # A list that is two items short is one problem.
        return None, list(dict.fromkeys(problems))


def _problem(error: ErrorDetails, described: dict[str, Any]) -> _Problem:
    path, kind, found, context = error["loc"], error["type"], error["input"], error.get("ctx", {})
    if kind == "spec":
        return _Problem(
            tuple(tuple(key.split(".")) for key in context["keys"]), f"{context['keys'][0]}: {context['text']}"
        )
    if kind == "value_error":
        text = str(context["error"])
    elif kind == "extra_forbidden":
        text = _unknown_key(path, described)
    elif kind == "missing" and isinstance(path[-1], str):
        part = _part(described, path)
        text = f"missing, expected {_expected(part, described)}"
        if "description" in part and "pattern" not in part:
            text += f": {part['description']}"
    else:
        if kind == "missing":
            path = path[:-1]
        text = f"expected {_expected(_part(described, path), described)}, found {_shown(found)}"
        if kind == "string_type" and isinstance(found, bool | int | float):
            text += "; put it in quotes"
        if found is None and path and path[-1] not in _part(described, path[:-1]).get("required", ()):
            text += "; leave the key out to have its default"
    return _Problem((path,), f"{_dotted(path)}: {text}" if path else text)


def _unknown_key(path: KeyPath, described: dict[str, Any]) -> str:
    allowed = list(_part(described, path[:-1])["properties"])
    key = str(path[-1])
    near = difflib.get_close_matches(key, allowed, n=1)
    if near:
        return f"unknown key; did you mean {_dotted((*path[:-1], near[0]))}?"
    elsewhere = [
        f"{section}.{key}"
        for section in described["properties"]
        if key in _part(described, (section,)).get("properties", {})
    ]
    if elsewhere:
        return f"unknown key; did you mean {' or '.join(elsewhere)}?"
    return f"unknown key, allowed here: {', '.join(allowed)}"


def _part(described: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    """The schema of the value at `path`."""
    part = described
    for key in path:
        if "anyOf" in part:
            part = next(one for one in part["anyOf"] if one.get("type") != "null")
        if isinstance(key, str):
            part = part["properties"][key]
        else:
            part = part["prefixItems"][key] if "prefixItems" in part else part["items"]
        part = _followed(part, described)
    return part


def _followed(part: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    """What a reference leads to; of a section that may be null, the section."""
    for one in (part, *part.get("anyOf", ())):
        if "$ref" in one:
            followed: dict[str, Any] = described["$defs"][one["$ref"].rpartition("/")[2]]
            return followed
    return part


def _expected(part: dict[str, Any], described: dict[str, Any]) -> str:
    """A schema in words: "a whole number of at least 1 or null"."""
    if "anyOf" in part:
        return ", or ".join(_expected(_followed(one, described), described) for one in part["anyOf"])
    if "enum" in part:
        *others, last = map(str, part["enum"])
        return f"{', '.join(others)} or {last}" if others else last
    match part["type"]:
        case "object":
            return f"keys ({', '.join(part['properties'])})"
        case "array" if "prefixItems" in part:
            return f"a list of {len(part['prefixItems'])}, each {_expected(part['prefixItems'][0], described)}"
        case "array":
            most = f" of at most {part['maxItems']}" if "maxItems" in part else ""
            return f"a list{most}, each {_expected(_followed(part['items'], described), described)}"
        case "string":
            # A pattern says nothing to people; what it is for does.
            return str(part["description"]) if "pattern" in part else "text"
        case "integer":
            return f"a whole number{_bounds(part)}"
        case "number":
            return f"a number{_bounds(part)}"
        case "boolean":
            return "true or false"
        case other:
            return str(other)


def _bounds(part: dict[str, Any]) -> str:
    if "minimum" in part and "maximum" in part:
        return f" from {part['minimum']:g} to {part['maximum']:g}"
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    return " and".join(f" {word} {part[bound]:g}" for bound, word in words.items() if bound in part)


def _shown(value: object) -> str:
    """A found value, short and on one line."""
    if value is None:
        return "nothing"
    return shortened(repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _dotted(path: KeyPath) -> str:
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += ("." if text else "") + (key if re.fullmatch(r"[\w-]+", key) else repr(shortened(key)))
    return text
