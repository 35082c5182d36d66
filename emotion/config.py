"""The sections of a spec: what each part of the science may be told. pydantic only, so that a login node can read a spec.

Every field has its unit in its name and its meaning in its description; `emotion-job schema` prints them. A `runtime_field`
says where or how a job runs, and does not change the result: it is left out of phase keys and of the fingerprint.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

Size = Annotated[int, Field(ge=8, le=4096)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Point = tuple[Annotated[float, Field(ge=-1, le=1)], Annotated[float, Field(ge=-1, le=1)]]


def runtime_field(default: Any, description: str, **bounds: Any) -> Any:
    """A field that says where or how a job runs."""
    return Field(default, description=description, json_schema_extra={"runtime": True}, **bounds)


def is_runtime(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("runtime"))


class Section(BaseModel):
    """Frozen, strict, unknown keys refused, infinity and NaN refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)

    def result_fields(self) -> dict[str, Any]:
        """The section as JSON values without its runtime fields: what keys and fingerprint are made from.

        A section with runtime fields only is left out, so that a new one does not change the fingerprint of existing specs.
        """
        kept: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if is_runtime(field):
                continue
            value = getattr(self, name)
            found = value.result_fields() if isinstance(value, Section) else value
            if not (isinstance(value, Section) and not found):
                kept[name] = found
        return kept


class DataConfig(Section):
    source: str = Field(
        description="a folder with DEAM in any known layout, file://…, s3://BUCKET/PREFIX, or generated:N for N made songs",
        min_length=1,
    )
    copy_songs: Literal["auto", "always", "never"] = runtime_field(
        "auto",
        "of a folder's songs into scratch; auto: unless that is on the same file system, where they are read in place",
        # pydantic's models have a method of this name.
        alias="copy",
    )
    manifest: str | None = runtime_field(
        None, "JSON file with size and SHA-256 of the source's files, which are held against it; or dataset.json there"
    )
    faults: Literal["fail", "drop"] = Field(
        "fail", description="wrong labels and audio: fail with one report of all, or drop those songs and say so"
    )
    drop_at_most: Fraction = Field(0.05, description="drop: share of the songs that may be left out")
    shortest_seconds: float = Field(5.0, ge=0, description="a shorter song is a fault")
    longest_seconds: float = Field(1200.0, gt=0, le=36000, description="a longer song is a fault; no more is decoded")
    excerpt_seconds: float | None = Field(
        None,
        gt=0,
        description="ids up to 2000 that last over a second less are cut: 45 for DEAM; not given: any length",
    )
    silence_db: float = Field(-60.0, le=0, description="a song with an RMS below this, in dB of full scale, is a fault")
    largest_peak: float = Field(
        4.0, gt=0, description="a song with a sample beyond this, full scale being 1, is a fault"
    )


class SplitConfig(Section):
    protocol: Literal["kfold", "holdout", "lists"] = Field("kfold", description="how test songs are chosen")
    folds: int = Field(5, ge=2, le=50, description="kfold: number of folds")
    fold: int = Field(0, ge=0, description="kfold: which fold is the test set, counted from 0")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="holdout: share of the songs that are the test set")
    validation_fraction: float = Field(0.15, gt=0, lt=1, description="share of the other songs used for validation")
    grouped: bool = Field(True, description="keep songs of one group (or artist) together where metadata names it")
    lists: str | None = Field(None, description="lists: folder with train.txt, validation.txt, test.txt of song ids")
    seed: int = Field(0, ge=0, description="shuffles the songs; apart from the job's seed, so that seeds share folds")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.protocol == "kfold" and self.fold >= self.folds:
            raise ValueError(f"fold is {self.fold}, but with {self.folds} folds it must be 0 to {self.folds - 1}")
        if (self.protocol == "lists") != (self.lists is not None):
            raise ValueError("lists names a folder exactly when protocol is 'lists'")
        return self


class MelConfig(Section):
    sample_rate_hz: int = Field(22050, ge=4000, le=96000, description="sound is resampled to this")
    window_samples: int = Field(2048, ge=64, le=65536, description="Hann window of the Fourier transform")
    hop_samples: int = Field(512, ge=16, description="from one frame to the next")
    mels: int = Field(128, ge=16, le=1024, description="mel bands")
    fmin_hz: float = Field(20.0, ge=0, description="lower end of the lowest band")
    fmax_hz: float = Field(8000.0, gt=0, description="upper end of the highest band")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.fmin_hz < self.fmax_hz <= self.sample_rate_hz / 2:
            raise ValueError(
                f"needs fmin_hz < fmax_hz <= sample_rate_hz / 2, found {self.fmin_hz:g}, {self.fmax_hz:g}, "
                f"{self.sample_rate_hz / 2:g}"
            )
        if self.hop_samples > self.window_samples:
            raise ValueError(f"hop_samples {self.hop_samples} is longer than window_samples {self.window_samples}")
        return self

    def frames(self, seconds: float) -> int:
        """Frames of a clip: 1,292 for the notebook's 30 s."""
        return 1 + int(seconds * self.sample_rate_hz) // self.hop_samples


class InitConfig(Section):
    run: str = Field(
        description="a published run to start from, a folder or s3://…; without this section nothing is started from",
        min_length=1,
    )
    gan: bool = Field(True, description="generator and discriminator start from its weights")
    vit: bool = Field(True, description="the ViT with its head starts from its weights; vit.weights is left out")
    normalisation: Literal["kept", "new"] = Field(
        "kept", description="of GAN and ViT: kept as it is there, or new from this split's training songs"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not (self.gan or self.vit):
            raise ValueError("with gan and vit both false nothing starts from the run; leave the section out")
        return self


class GanConfig(Section):
    epochs: float = Field(150.0, gt=0, description="passes over the training songs")
    batch_size: int = Field(48, ge=1, description="effective batch: songs per optimizer step")
    micro_batch: int | None = runtime_field(
        None, "songs per forward pass; not given: what is predicted to fit a GPU, on a CPU the whole batch", ge=1
    )
    clip_seconds: float = Field(10.0, ge=0.25, description="length of a real or synthetic clip")
    latent: int = Field(64, ge=1, description="numbers in the latent vector")
    width: int = Field(32, ge=4, description="channels at half resolution, doubled at each coarser one")
    generator_learning_rate: float = Field(2e-4, gt=0, description="of Adam, constant")
    discriminator_learning_rate: float = Field(2e-4, gt=0, description="of Adam, constant")
    penalty_weight: float = Field(1.0, ge=0, description="R1 and R2 gradient penalties, gamma")
    penalty_every_steps: int = Field(
        4, ge=1, description="the penalties are taken at every n-th step, n times as strong"
    )
    ema_decay: float = Field(0.995, ge=0, lt=1, description="of the generator's weights; ramped up from 0")
    clear_cache_every_steps: int = runtime_field(
        0, "give unused device memory back every n steps; 0 = never, and best", ge=0
    )


class SynthConfig(Section):
    songs: int = Field(1600, ge=4, description="synthetic clips to make")
    label_spread: float = Field(1.0, gt=0, description="bandwidth of the label density, times Scott's rule")
    samples: tuple[Point, ...] = Field(
        ((-0.8, -0.6), (0.8, 0.7), (-0.3, 0.8), (0.5, -0.5), (0.0, 0.0)),
        description="(valence, arousal) of the clips written as wav and png",
        max_length=64,
    )
    griffin_lim_iterations: int = Field(32, ge=1, description="rounds of phase reconstruction")


class QualityConfig(Section):
    components: int = Field(16, ge=2, description="dimensions of the space in which distances are taken, at most")


class VitConfig(Section):
    model: str = Field("vit_tiny_patch16_224", description="any ViT of timm, without a weights tag")
    weights: str = Field(
        "pretrained",
        description="pretrained (timm's own), a timm tag, a folder, a .safetensors or .pth file (also s3://…), or random",
        min_length=1,
    )
    clip_seconds: float = Field(10.0, gt=0, description="length of a crop")
    image_size: tuple[Size, Size] | None = Field(
        None, description="resize (mels, frames) to this height and width; not given: no resizing"
    )
    channels: Literal[1, 3] = Field(1, description="3 repeats the log-mel, as the notebook did")
    epochs: float = Field(30.0, gt=0, description="passes over the real training songs, at most")
    patience_epochs: int = Field(8, ge=1, description="stop after so many epochs without a better validation CCC")
    batch_size: int = Field(32, ge=2, description="effective batch, real and synthetic together")
    micro_batch: int | None = runtime_field(
        None, "clips per forward pass; not given: what is predicted to fit a GPU, on a CPU the whole batch", ge=1
    )
    learning_rate: float = Field(5e-5, gt=0, description="of the head; the backbone's falls by layer_decay a layer")
    layer_decay: float = Field(0.75, gt=0, le=1, description="a layer learns this much slower than the one above")
    weight_decay: float = Field(0.05, ge=0, description="of AdamW; not for biases, norms and embeddings")
    warmup_fraction: Fraction = Field(0.05, description="share of the steps with a rising learning rate, then cosine")
    frozen_epochs: float = Field(0.0, ge=0, description="epochs in which only the head and the last norm learn")
    unfreeze_epochs: float = Field(0.0, ge=0, description="then the blocks follow one by one, from the top, over this")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth of the last block, linear from 0")
    head_dropout: float = Field(0.1, ge=0, lt=1, description="before the last linear layer")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of a gradient")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the weights; ramped up from 0")
    ccc_weight: Fraction = Field(0.5, description="loss = w (1 - CCC) + (1 - w) MSE / label variance")
    mixup_alpha: float = Field(0.2, ge=0, description="Beta(a, a) of C-Mixup; 0 = off")
    mixup_bandwidth: float = Field(0.2, gt=0, description="C-Mixup prefers partners with labels this near")
    time_masks: int = Field(2, ge=0, description="SpecAugment: spans of frames blanked in a clip")
    time_mask_seconds: float = Field(0.7, gt=0, description="longest time mask")
    mel_masks: int = Field(2, ge=0, description="SpecAugment: spans of bands blanked in a clip")
    mel_mask_bands: int = Field(15, ge=1, description="widest mel mask")
    synthetic_share: float = Field(0.25, ge=0, lt=1, description="share of synthetic clips in each batch")
    max_crops: int = Field(16, ge=1, description="crops averaged per song in validation, test and predict, at most")

    @property
    def weights_file(self) -> str | None:
        """Path or URL of the file that `weights` names, None for the words and timm's tags, of which none has a slash."""
        if "/" not in self.weights:
            return None
        return self.weights if self.weights.endswith((".safetensors", ".pth")) else f"{self.weights}/model.safetensors"

    @property
    def synthetic_per_batch(self) -> int:
        return round(self.synthetic_share * self.batch_size)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size - self.synthetic_per_batch < 2:
            raise ValueError(
                f"synthetic_share {self.synthetic_share:g} leaves fewer than 2 of {self.batch_size} clips real"
            )
        return self


class EvaluateConfig(Section):
    bootstrap_samples: int = Field(2000, ge=100, description="resamplings of the test songs behind each 95 % interval")
    raters_per_excerpt: int = Field(10, ge=2, description="people behind each label of ids up to 2000; for the ceiling")
    raters_per_full_song: int = Field(5, ge=2, description="people behind each label of ids above 2000")


class DeviceConfig(Section):
    kind: Literal["auto", "cpu", "cuda"] = runtime_field("auto", "auto takes a GPU if there is one")
    threads: int | None = runtime_field(None, "CPU threads; all that the process may use if not given", ge=1)
    deterministic: bool | None = runtime_field(None, "same bytes every time; not given: yes on CPU, no on GPU")
    gpu_memory_gib: float | None = runtime_field(
        None, "no more of a GPU's memory than this; not given: all of it. A CPU's is not limited", gt=0
    )


class CheckpointConfig(Section):
    every_seconds: float = runtime_field(30.0, "by the monotonic clock", ge=0)
    keep: int = runtime_field(2, "newest checkpoints to keep", ge=1)
    mirror: str | None = runtime_field(
        None, "folder or s3://… that gets every checkpoint and finished phase, so that another machine can go on"
    )


Precision = Literal["auto", "bf16", "fp16", "fp32"]
Part = Literal["gan", "vit"]
"""What can start from an earlier run."""
