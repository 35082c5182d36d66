"""What the README says of the spec is what the spec is."""

from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from job.spec.model import JobSpec
from slurm.cluster import ClusterConfig
from tests.conftest import section_of

README = Path(__file__).parent.parent / "README.md"


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def row(key: str, field: FieldInfo) -> str:
    default = "(required)" if field.is_required() else shown(field.get_default(call_default_factory=True))
    extra = field.json_schema_extra
    star = " *" if isinstance(extra, dict) and extra.get("runtime") else ""
    return f"| `{key}`{star} | {default} | {field.description} |"


def spec_table() -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in JobSpec.model_fields.items():
        section = section_of(field)
        if section is not None:
            lines += [row(f"{name}.{inner.alias or key}", inner) for key, inner in section.model_fields.items()]
        else:
            lines.append(row(name, field))
    return "\n".join(lines)


def test_the_spec_table_is_the_spec() -> None:
    assert spec_table() in README.read_text(encoding="utf-8"), f"put this table into README.md:\n{spec_table()}"


def test_every_field_has_a_description() -> None:
    assert "| None |" not in spec_table()


def cluster_table() -> str:
    lines = ["| cluster file | default | meaning |", "|---|---|---|"]
    for name, field in ClusterConfig.model_fields.items():
        section = section_of(field)
        if section is not None:
            lines += [row(f"{name}.{key}", inner) for key, inner in section.model_fields.items()]
        else:
            lines.append(row(name, field))
    return "\n".join(lines)


def test_the_table_of_the_cluster_file_is_what_it_may_say() -> None:
    assert cluster_table() in README.read_text(encoding="utf-8"), f"put this table into README.md:\n{cluster_table()}"
