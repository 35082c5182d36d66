"""The model of a spec, its fingerprint, and its YAML form. Imports no torch.
A resolved spec is complete: it has every default and only absolute paths, so it means the same on any machine."""

import json
from collections.abc import Callable
from typing import Any, TypeVar, get_args

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from emotion import config
from emotion.config import Precision, Section
from emotion.files import digest_of
from job.config import ArtifactsConfig, BudgetConfig, NotifyConfig, PreemptionConfig, StorageConfig, TrackConfig
from job.spec.location import GENERATED_SCHEME, Location, StoredLocation, parse_location, parse_path, parse_source
from job.spec.strict_yaml import shown

AnySection = TypeVar("AnySection", bound=Section)

LOCATIONS: dict[str, dict[str, Callable[[str], object]]] = {
    "data": {"manifest": parse_location, "source": parse_source},
    "split": {"lists": parse_path, "out_of_fold": parse_path},
    "init_from": {"run": parse_location},
    "vit": {"teacher": parse_location},
    "checkpoint": {"mirror": parse_location},
    "track": {"tensorboard": parse_path},
    "artifacts": {"destination": parse_location},
}
"""Section → key → the function that makes its value absolute. vit.weights may also be a word."""


def _refusal(text: str, *keys: str) -> PydanticCustomError:
    """A problem that several dotted keys cause together. keys: the one to change comes first."""
    return PydanticCustomError("spec", "{text}", {"text": text, "keys": keys})


class JobSpec(Section):
    """The spec of a job. The constructor resolves it: relative paths start at the current folder."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="1 to 40 lower-case letters, digits and hyphens, the first not a hyphen"
    )
    seed: int = Field(0, ge=0, description="of everything random, except the split, which has its own")
    precision: Precision = Field("auto", description="auto: the fastest that the device supports well")
    data: config.DataConfig
    split: config.SplitConfig = Field(default_factory=config.SplitConfig)
    mel: config.MelConfig = Field(default_factory=config.MelConfig)
    init_from: config.InitConfig | None = None
    gan: config.GanConfig = Field(default_factory=config.GanConfig)
    synth: config.SynthConfig = Field(default_factory=config.SynthConfig)
    quality: config.QualityConfig = Field(default_factory=config.QualityConfig)
    # The default is validated, too: gan.clip_seconds may be too short for it.
    vit: config.VitConfig = Field(default_factory=config.VitConfig, validate_default=True)
    evaluate: config.EvaluateConfig = Field(default_factory=config.EvaluateConfig)
    device: config.DeviceConfig = Field(default_factory=config.DeviceConfig)
    checkpoint: config.CheckpointConfig = Field(default_factory=config.CheckpointConfig)
    preemption: PreemptionConfig = Field(default_factory=PreemptionConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    notify: NotifyConfig = Field(default_factory=NotifyConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)
    artifacts: ArtifactsConfig = Field(default_factory=ArtifactsConfig)

    def result_fields(self) -> dict[str, Any]:
        found = super().result_fields()
        # Specs without a warm start or a budget keep the fingerprint that they had before these sections existed.
        if self.init_from is None:
            del found["init_from"]
        if self.budget.minutes is None:
            del found["budget"]
        return found

    @property
    def source(self) -> Location:
        return parse_source(self.data.source)

    @property
    def destination(self) -> StoredLocation | None:
        return parse_location(self.artifacts.destination) if self.artifacts.destination else None

    @property
    def mirror(self) -> StoredLocation | None:
        return parse_location(self.checkpoint.mirror) if self.checkpoint.mirror else None

    @property
    def warm_start_run(self) -> StoredLocation | None:
        return parse_location(self.init_from.run) if self.init_from else None

    @property
    def dataset_manifest(self) -> StoredLocation | None:
        return parse_location(self.data.manifest) if self.data.manifest else None

    @property
    def weights(self) -> StoredLocation | None:
        """The file or folder that vit.weights names; None for `random`, `pretrained` and timm's tags."""
        return parse_location(self.vit.weights) if self.vit.weights_file else None

    @property
    def weights_file(self) -> StoredLocation | None:
        return parse_location(self.vit.weights_file) if self.vit.weights_file else None

    @property
    def begins_with_probe(self) -> bool:
        """Whether the head of the ViT is fitted before the first step: with pretrained weights, but not after a warm start."""
        return self.vit.weights != "random" and not (self.init_from and self.init_from.vit)

    @property
    def vit_trainings(self) -> int:
        """How often the ViT is trained: with `auto` twice, without and with synthetic clips; a final model once."""
        return 2 if self.vit.synthetic == "auto" and self.split.protocol != "all" else 1

    @property
    def teacher(self) -> StoredLocation | None:
        return parse_location(self.vit.teacher) if self.vit.teacher else None

    # Field validators, because one for the whole spec would not run while another section has an error.

    @field_validator(*LOCATIONS)
    @classmethod
    def _locations_resolved(cls, section: AnySection | None, info: ValidationInfo) -> AnySection | None:
        if section is not None:
            for key, parse in LOCATIONS[str(info.field_name)].items():
                section = _with_resolved(section, key, str(info.field_name), parse)
        return section

    @field_validator("data")
    @classmethod
    def _generated_songs_have_a_scale(cls, data: config.DataConfig) -> config.DataConfig:
        if data.scale is None or not data.source.startswith(GENERATED_SCHEME):
            return data
        raise _refusal("generated songs have a scale of their own; leave data.scale out", "data.scale", "data.source")

    @field_validator("split")
    @classmethod
    def _generated_songs_have_no_split(cls, split: config.SplitConfig, info: ValidationInfo) -> config.SplitConfig:
        data = info.data.get("data")
        if data is None or split.protocol != "column" or not data.source.startswith(GENERATED_SCHEME):
            return split
        raise _refusal("generated songs have no column split; choose another protocol", "split.protocol", "data.source")

    @field_validator("vit")
    @classmethod
    def _weights_resolved(cls, vit: config.VitConfig) -> config.VitConfig:
        text = vit.weights
        # Anything else is a keyword or one of timm's tags, such as vit_base_patch16_224.augreg_in21k.
        is_path = "/" in text or text.startswith((".", "~", "$", "%")) or text.endswith(config.WEIGHTS_SUFFIXES)
        return _with_resolved(vit, "weights", "vit", parse_location) if is_path else vit

    @field_validator("vit")
    @classmethod
    def _weights_from_one_place(cls, vit: config.VitConfig, info: ValidationInfo) -> config.VitConfig:
        init = info.data.get("init_from")
        if init is None or not init.vit or vit.weights == config.VitConfig.model_fields["weights"].default:
            return vit
        raise _refusal(
            f"the ViT would start from {shown(vit.weights)} and from the run in init_from; leave vit.weights out (its default "
            f"counts as that), or set init_from.vit to false",
            "vit.weights",
            "init_from.vit",
        )

    @field_validator("vit")
    @classmethod
    def _a_probe_has_a_new_head(cls, vit: config.VitConfig, info: ValidationInfo) -> config.VitConfig:
        init = info.data.get("init_from")
        if init is None or not init.vit or vit.epochs > 0:
            return vit
        raise _refusal(
            "0 is only a linear probe, but a ViT of an earlier run keeps its head; set vit.epochs above 0, or "
            "init_from.vit to false",
            "vit.epochs",
            "init_from.vit",
        )

    @field_validator("vit")
    @classmethod
    def _synthetic_clips_fill_a_crop(cls, vit: config.VitConfig, info: ValidationInfo) -> config.VitConfig:
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


def fingerprint(spec: JobSpec) -> str:
    """Hex SHA-256 of all fields that affect the result. Runtime fields (device, storage, …) are left out."""
    return digest_of(spec.result_fields())


def run_name(spec: JobSpec) -> str:
    """NAME-KEY12, the name of the run folder and of the published folder."""
    return f"{spec.name}-{fingerprint(spec)[:12]}"


def to_yaml(spec: JobSpec) -> str:
    """The resolved spec with every default, as YAML. `load_spec` and any other YAML reader get equal values from it."""
    lines: list[str] = []
    for key in type(spec).model_fields:
        value = getattr(spec, key)
        if isinstance(value, Section):
            lines.append(f"{key}:")
            fields = type(value).model_fields.items()
            lines.extend(f"  {field.alias or name}: {written(getattr(value, name))}" for name, field in fields)
        else:
            lines.append(f"{key}: {written(value)}")
    return "\n".join(lines) + "\n"


def keys_of_spec() -> list[tuple[str, str]]:
    """Every key, such as gan.epochs, with its description."""
    found = []
    for name, field in JobSpec.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        keys = {name: field} if section is None else section.model_fields
        parent = "" if section is None else f"{name}."
        found += [(f"{parent}{inner.alias or key}", str(inner.description)) for key, inner in keys.items()]
    return found


def schema() -> dict[str, Any]:
    """JSON Schema of the spec, for editors."""
    described = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described, "title": "emotion-job spec"}


def written(value: object) -> str:
    """A value in a form that YAML 1.1 and 1.2 read alike: text in quotes, an exponent only after a decimal point."""
    if isinstance(value, tuple):
        return f"[{', '.join(written(item) for item in value)}]"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    return json.dumps(value, ensure_ascii=False)


def _with_resolved(section: AnySection, key: str, name: str, parse: Callable[[str], object]) -> AnySection:
    """The section with one field replaced by its parsed and absolute form. name: of the section."""
    text = getattr(section, key)
    if text is None:
        return section
    try:
        return section.model_copy(update={key: str(parse(text))})
    except ValueError as error:
        raise _refusal(str(error), f"{name}.{key}") from None
