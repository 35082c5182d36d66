"""Loads a spec from YAML, or another document with a pydantic model, and reports every problem at once with line and column."""

import copy
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from emotion.characters import name_of
from emotion.errors import SpecError, printable
from job.secrets import known_secret
from job.spec import strict_yaml
from job.spec.model import AnySection, JobSpec
from job.spec.strict_yaml import KeyPath, Value, shortened, shown, without_secret


def load_spec(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """The resolved spec of a YAML file. overrides: such as "gan.epochs=2"; the last one for a key counts.
    Raises SpecError with every problem found: `FILE:LINE:COLUMN: key: what was found, what is allowed`; for an override, `--set
    gan.epochs=2` replaces the position. Two kinds of problems are reported only after others are corrected: those after a YAML
    syntax error, and those of several keys together if one of the keys is wrong by itself."""
    spec = load_document(path, JobSpec, "spec", overrides)
    for key, name in _secrets(spec.model_dump(mode="json"), ""):
        raise SpecError(f"{path}: {key} holds the value of {name}, and the spec is published. Take it out, or unset {name}.")
    return spec


def _secrets(value: Value, key: str) -> Iterator[tuple[str, str]]:
    """(key, name of the secret) of values that hold a secret."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _secrets(inner, f"{key}.{name}".removeprefix("."))
    elif name_of_secret := known_secret(json.dumps(value)):
        yield key, name_of_secret


def load_document(path: Path, model: type[AnySection], kind: str, overrides: Sequence[str] = ()) -> AnySection:
    """The content of a YAML file as `model`, read and checked like a spec. kind: what messages call such a file."""
    document = strict_yaml.read(_content(path, kind), str(path))
    in_text = [(p.line, p.column, f"{path}:{p.line}:{p.column}: {p.text}") for p in document.problems]
    unknown = [p.hides for p in document.problems if p.hides is not None]
    in_file: Value = {} if document.value is None else document.value

    value = copy.deepcopy(in_file)
    labels: list[tuple[KeyPath, str]] = []
    from_overrides: list[str] = []
    for override in overrides:
        dotted, _, text = override.partition("=")
        keys, label = tuple(dotted.strip().split(".")), f"--set {shortened(printable(without_secret(override)))}"
        try:
            if "=" not in override or not all(re.fullmatch(r"[\w-]+", key) for key in keys):
                raise SpecError(f"{label}: expected KEY=VALUE, such as gan.epochs=2")
            _put(value, keys, strict_yaml.scalar_or_flow(text, label), label)
            labels.append((keys, label))
        except SpecError as error:
            from_overrides.extend(error.problems)
            unknown.append(keys)

    section, problems = _validated(value, model)
    if problems and (other := _another_kind(in_file, kind)):
        raise SpecError(f"{path}: {other}")
    without_overrides = {p.text for p in _validated(in_file, model)[1]} if problems and labels else set()
    for problem in problems:
        if any(_related(key, other) for key in problem.keys for other in unknown):
            continue
        causes = [label for keys, label in labels if any(_related(key, keys) for key in problem.keys)]
        if causes and problem.text not in without_overrides:
            from_overrides.append(f"{causes[-1]}: {problem.text}")
            continue
        with_position = [key for key in problem.keys if key in document.positions]
        line, column = document.position((with_position or problem.keys)[0])
        in_text.append((line, column, f"{path}:{line}:{column}: {problem.text}"))
    if in_text or from_overrides or section is None:
        raise SpecError(*(text for _, _, text in sorted(in_text, key=lambda problem: problem[:2])), *from_overrides)
    return section


def _another_kind(value: Value, kind: str) -> str | None:
    """A message if the keys show that the file is of another kind than expected; else None. It replaces one error per key."""
    if not isinstance(value, dict):
        return None
    if "manifest_version" in value:
        return f"this is the manifest of a published run, expected a {kind}; use spec.yaml beside it, or emotion-job reproduce"
    if "runtime" in value or "time_limit_minutes" in value:
        found = "cluster file"
    elif "spec" in value:
        found = "sweep"
    elif "data" in value:
        found = "spec"
    else:
        return None
    return None if found == kind else f"this looks like a {found}, expected a {kind}; name the other file"


def spec_of(value: Value) -> JobSpec:
    """The spec of a JSON value, such as the one in a manifest. Raises SpecError with every problem found."""
    spec, problems = _validated(value, JobSpec)
    if spec is None:
        raise SpecError(*(problem.text for problem in problems))
    return spec


def _content(path: Path, kind: str) -> bytes:
    try:
        with path.open("rb") as file:
            # One byte more than allowed shows that the file is too long; even /dev/zero is not read further.
            return file.read(strict_yaml.MAX_BYTES + 1)
    except OSError as error:
        found, remedy = {
            FileNotFoundError: ("no such file", "check the path"),
            IsADirectoryError: ("a folder", "name a file in it"),
            PermissionError: ("no permission to read it", "check its owner and mode"),
        }.get(type(error), (f"cannot be read, {error.strerror}", "check the path"))
        raise SpecError(f"{path}: {found}, expected a {kind} in YAML; {remedy}") from None


def _put(value: Value, keys: tuple[str, ...], new: Value, label: str) -> None:
    for depth, key in enumerate(keys):
        if not isinstance(value, dict):
            parent = ".".join(keys[:depth]) or "the spec"
            raise SpecError(f"{label}: {parent} is {shown(value)}, which has no keys; set all of it")
        if depth == len(keys) - 1:
            value[key] = new
            return
        if value.get(key) is None:
            value[key] = {}
        value = value[key]


def _related(one: KeyPath, other: KeyPath) -> bool:
    """Whether the paths are equal or one is below the other."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


@dataclass(frozen=True)
class _Problem:
    """A message, and the keys that may have caused it, most likely first."""

    keys: tuple[KeyPath, ...]
    text: str


def _validated(value: Value, model: type[AnySection]) -> tuple[AnySection | None, list[_Problem]]:
    try:
        # As JSON, because pydantic's strict mode accepts a JSON list as a tuple, but not a Python list.
        return model.model_validate_json(json.dumps(value)), []
    except ValidationError as error:
        schema = model.model_json_schema()
        problems = [_problem(detail, schema) for detail in error.errors(include_url=False)]
        return None, list(dict.fromkeys(problems))  # a list with two items missing is one problem


def _problem(error: ErrorDetails, schema: dict[str, Any]) -> _Problem:
    path, kind, found, context = error["loc"], error["type"], error["input"], error.get("ctx", {})
    if kind == "spec":
        return _Problem(tuple(tuple(key.split(".")) for key in context["keys"]), f"{context['keys'][0]}: {context['text']}")
    if kind == "value_error":
        text = str(context["error"])
    elif kind == "extra_forbidden":
        text = _unknown_key(path, schema)
    elif kind == "missing" and isinstance(path[-1], str):
        part = _part(schema, path)
        text = f"missing, expected {_expected(part, schema)}"
        if "description" in part and "pattern" not in part:
            text += f": {part['description']}"
    else:
        if kind == "missing":
            path = path[:-1]
        text = f"expected {_expected(_part(schema, path), schema)}, found {shown(found)}"
        if isinstance(found, str) and re.match(r"[\w-]+:\S", found) and "properties" in _part(schema, path):
            text += "; a blank has to follow the ':' of a key"
        if kind == "string_type" and isinstance(found, bool | int | float):
            text += "; put it in quotes"
        if found is None and path and path[-1] not in _part(schema, path[:-1]).get("required", ()):
            text += "; leave the key out to have its default"
    return _Problem((path,), f"{_dotted(path)}: {text}" if path else text)


def _unknown_key(path: KeyPath, schema: dict[str, Any]) -> str:
    allowed = list(_part(schema, path[:-1])["properties"])
    key = str(path[-1])
    # Letters of other scripts may look like those of the right key.
    foreign = ", ".join(dict.fromkeys(name_of(sign) for sign in key[:40] if not sign.isascii()))
    unknown = f"unknown key with {foreign}" if foreign else "unknown key"
    similar = difflib.get_close_matches(key, allowed, n=1)
    if similar:
        return f"{unknown}; did you mean {_dotted((*path[:-1], similar[0]))}?"
    elsewhere = [f"{section}.{key}" for section in schema["properties"] if key in _part(schema, (section,)).get("properties", {})]
    if elsewhere:
        return f"{unknown}; did you mean {' or '.join(elsewhere)}?"
    return f"{unknown}, allowed here: {', '.join(allowed)}"


def _part(schema: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    """The schema of the value at `path`."""
    part = schema
    for key in path:
        if "anyOf" in part:
            part = next(one for one in part["anyOf"] if one.get("type") != "null")
        if isinstance(key, str):
            part = part["properties"][key]
        else:
            part = part["prefixItems"][key] if "prefixItems" in part else part["items"]
        part = _resolved(part, schema)
    return part


def _resolved(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with a reference resolved; for a section that may be null, the schema of the section."""
    for one in (part, *part.get("anyOf", ())):
        if "$ref" in one:
            found: dict[str, Any] = schema["$defs"][one["$ref"].rpartition("/")[2]]
            return found
    return part


def _expected(part: dict[str, Any], schema: dict[str, Any]) -> str:
    """A schema in words: "a whole number of at least 1 or null"."""
    if "anyOf" in part:
        return ", or ".join(_expected(_resolved(one, schema), schema) for one in part["anyOf"])
    if "enum" in part:
        *others, last = map(str, part["enum"])
        return f"{', '.join(others)} or {last}" if others else last
    match part["type"]:
        case "object":
            return f"keys ({', '.join(part['properties'])})"
        case "array" if "prefixItems" in part:
            return f"a list of {len(part['prefixItems'])}, each {_expected(part['prefixItems'][0], schema)}"
        case "array":
            number = " of at least one" if part.get("minItems") else ""
            number = f" of at most {part['maxItems']}" if "maxItems" in part else number
            return f"a list{number}, each {_expected(_resolved(part['items'], schema), schema)}"
        case "string":
            # The description is easier to read than a pattern.
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
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "of at most", "exclusiveMaximum": "below"}
    return " and".join(f" {word} {part[bound]:g}" for bound, word in words.items() if bound in part)


def _dotted(path: KeyPath) -> str:
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += ("." if text else "") + (key if re.fullmatch(r"[\w-]+", key) else repr(shortened(key)))
    return text
