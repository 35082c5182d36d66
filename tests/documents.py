"""The tables of the documents that are generated from the code. `make docs` rewrites them.

    python -m tests.documents

A table stands between `<!-- generated: MARK -->` and `<!-- end of generated -->`.
"""

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic.fields import FieldInfo

from emotion.config import Section
from emotion.errors import exit_codes
from emotion.files import sha256_of, write_text
from job.pipeline.fetch_inputs import FetchedInputs
from job.pipeline.phases import PHASES
from job.pipeline.runner import phase_key
from job.pipeline.warm_start import CONSTANTS, WEIGHTS
from job.preemption import StopRequest
from job.run_folder.receipts import Receipt
from job.spec.load import load_spec, spec_of
from job.spec.model import JobSpec, fingerprint, run_name
from slurm.cluster import ClusterConfig
from slurm.sweep import SettingConfig, SweepConfig
from tests.conftest import section_of

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "emotion", "job", "job/specs", "slurm", "container", "tests")
DOCUMENTS = {f"{folder}/README.md".lstrip("/"): ROOT / folder / "README.md" for folder in FOLDERS}
DOCUMENTS |= {f"job/{name}.md": ROOT / "job" / f"{name}.md" for name in ("walkthroughs", "troubleshooting")}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(shown, value))}]"
    return value.name if isinstance(value, SettingConfig) else str(value)


def row_of_field(key: str, field: FieldInfo) -> list[str]:
    default = "(required)" if field.is_required() else shown(field.get_default(call_default_factory=True))
    extra = field.json_schema_extra
    star = " *" if isinstance(extra, dict) and extra.get("runtime") else ""
    return [f"`{key}`{star}", default, str(field.description)]


def rows_of_fields(model: type[Section]) -> list[list[str]]:
    rows = []
    for name, field in model.model_fields.items():
        section = section_of(field)
        items = "[]" if get_origin(field.annotation) is tuple else ""
        if section is None or items:
            rows.append(row_of_field(name, field))
        if section is not None:
            fields = section.model_fields.items()
            rows += [row_of_field(f"{name}{items}.{inner.alias or key}", inner) for key, inner in fields]
    return rows


def spec_table() -> str:
    return table(("key", "default", "meaning"), rows_of_fields(JobSpec))


def cluster_table() -> str:
    return table(("key", "default", "meaning"), rows_of_fields(ClusterConfig))


def sweep_table() -> str:
    return table(("key", "default", "meaning"), rows_of_fields(SweepConfig))


def exit_code_table() -> str:
    """Code, meaning, and whether a retry helps."""
    rows = [[str(code), known.meaning, "yes" if known.retry_helps else "no"] for code, known in exit_codes().items()]
    rows[0][-1] = ""
    return table(("exit code", "meaning", "the same command may succeed later"), rows)


def phase_table() -> str:
    rows = []
    for phase in PHASES:
        receipts = ", ".join(phase.receipt_dependencies)
        reads = ", ".join(phase.needs) + (f"; receipts of {receipts}" if receipts else "")
        rows.append([phase.name, str(phase.version), reads, ", ".join(f"`{one}`" for one in phase.sections), phase.kept_in])
    return table(("phase", "version", "reads the outputs of", "sections of the spec in its key", "folder in"), rows)


def other_than(key: str, value: Any, folder: Path) -> Any:
    """Another value of a field; only its text enters keys, but for those that name something."""
    named = {"data.source": "generated:25", "vit.weights": "random", "split.lists": str(folder / "lists")}
    named["split.out_of_fold"] = str(folder / "weights")  # any file
    if key in named:
        return named[key]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}x"


def earlier_run(folder: Path, content: str) -> Path:
    """What a warm start reads of a published run."""
    names = [name for files in (*WEIGHTS.values(), *CONSTANTS.values()) for name in files]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content + name)
    empty = ("spec", "phases", "inputs", "seeds", "libraries", "torch", "platform", "allocator", "comparable")
    manifest: dict[str, Any] = {
        **{key: {} for key in empty},
        **{key: [] for key in ("left_out", "warnings", "attempts")},
        **dict.fromkeys(("fingerprint", "python"), ""),
        "manifest_version": 1,
        "name": "earlier",
        "init_from": None,
        "container": None,
        "code": {"version": "", "source_sha256": "", "revision": None, "uncommitted_sha256": None},
        "artifacts": {name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names},
    }
    write_text(folder / "manifest.json", json.dumps(manifest))
    return folder


def phases_with_other_keys(before: JobSpec, after: JobSpec, fetched: FetchedInputs, other: FetchedInputs) -> list[str]:
    """Those whose key differs though the outputs of all phases before them are the same."""
    receipts = {phase.name: Receipt(Path(), "", {}, {}) for phase in PHASES}
    keys = [
        [phase_key(phase, spec, named, receipts, StopRequest()) for phase in PHASES]
        for spec, named in ((before, fetched), (after, other))
    ]
    return [phase.name for phase, one, two in zip(PHASES, *keys, strict=True) if one != two]


def key_table() -> str:
    """Every key of the spec is changed, one at a time; keys of a section that do the same share a row."""
    groups: dict[tuple[str, bool, tuple[str, ...]], list[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "lists").mkdir()
        for name in ("train", "validation", "test"):
            (folder / "lists" / f"{name}.txt").touch()
        first, second = (earlier_run(folder / name, name) for name in ("first", "second"))
        (folder / "weights").write_text("weights")
        (folder / "teacher").write_text("teacher")
        fetched = FetchedInputs(folder / "weights", first, folder / "teacher")
        named = {"init_from": {"run": str(first)}, "vit": {"teacher": str(folder / "teacher")}}
        spec = spec_of({"name": "x", "data": {"source": "generated:24"}, **named})
        for name, field in JobSpec.model_fields.items():
            section = getattr(spec, name)
            for key in type(section).model_fields if section_of(field) else (None,):
                dotted = name if key is None else f"{name}.{type(section).model_fields[key].alias or key}"
                value = other_than(dotted, section if key is None else getattr(section, key), folder)
                changed = spec.model_copy(update={name: value if key is None else section.model_copy(update={key: value})})
                other = FetchedInputs(fetched.weights, second, fetched.teacher) if dotted == "init_from.run" else fetched
                phases = tuple(phases_with_other_keys(spec, changed, fetched, other))
                groups.setdefault((name, fingerprint(spec) != fingerprint(changed), phases), []).append(dotted)
    rows = []
    for (name, other_run, phases), keys in groups.items():
        largest = max((group for group in groups if group[0] == name), key=lambda group: len(groups[group]))
        if len(keys) > 1 and other_run and (name, other_run, phases) == largest:
            keys = [f"{name}.*"]
        again = set(phases)
        for phase in PHASES:
            again.update([phase.name] if again & {*phase.dependencies} else [])
        rows.append(
            [
                ", ".join(f"`{key}`" for key in keys),
                "another run" if other_run else "the same run",
                ", ".join(phases) or "none",
                ", ".join(phase.name for phase in PHASES if phase.name in again) or "nothing",
            ]
        )
    return table(("another value of", "makes it", "enters the key of", "made again"), rows)


GENERATED: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "exit codes"): exit_code_table,
    ("job/README.md", "phases"): phase_table,
    ("job/README.md", "phase keys"): key_table,
    ("job/specs/README.md", "spec"): spec_table,
    ("slurm/README.md", "cluster"): cluster_table,
    ("slurm/README.md", "sweep"): sweep_table,
}
"""(document, mark) → its content."""


RUN_OF_DEMO = re.compile(r"\bdemo-[0-9a-f]{12}\b")


def between(mark: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- generated: {mark} -->\n)(.*?)(<!-- end of generated -->)", re.DOTALL)


def write() -> None:
    """Put the generated tables and the name of the demo's run into the documents."""
    for (name, mark), make in GENERATED.items():
        text = DOCUMENTS[name].read_text(encoding="utf-8")
        content = make()
        text, count = between(mark).subn(lambda match, content=content: f"{match[1]}{content}\n{match[3]}", text)  # type: ignore[misc]
        assert count == 1, f"{name} needs one <!-- generated: {mark} --> … <!-- end of generated -->"
        write_text(DOCUMENTS[name], text)
    demo = run_name(load_spec(ROOT / "job/specs/demo.yaml"))
    for path in DOCUMENTS.values():
        text = path.read_text(encoding="utf-8")
        if (renamed := RUN_OF_DEMO.sub(demo, text)) != text:
            write_text(path, renamed)


if __name__ == "__main__":
    write()
