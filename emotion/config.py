"""The sections of a spec that configure the science. Imports pydantic only, so that a login node can read a spec.

Field names hold the unit, descriptions the meaning. A `runtime_field` is left out of phase keys and fingerprint.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

WEIGHTS_SUFFIXES = (
    ".safetensors",
    ".pth",
    ".pt",
    ".bin",
    ".ckpt",
    ".tar",
    ".th",
    ".npz",
    ".npy",
    ".pkl",
    ".h5",
    ".onnx",
    ".gguf",
)
"""A name in vit.weights with one of these endings is a file, not a folder. Its format is detected from its first bytes."""
MOST_THREADS = 4096  # a larger number is a mistake: the process would fail to start them
Size = Annotated[int, Field(ge=8, le=4096)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Point = tuple[Annotated[float, Field(ge=-1, le=1)], Annotated[float, Field(ge=-1, le=1)]]


def runtime_field(default: Any, description: str, **bounds: Any) -> Any:
    """A field that says where or how a job runs, such as a device or a folder."""
    return Field(default, description=description, json_schema_extra={"runtime": True}, **bounds)


def is_runtime(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("runtime"))


class Section(BaseModel):
    """Base of all sections: frozen and strict; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True, defer_build=True
    )

    added_later: ClassVar[frozenset[str]] = frozenset()
    """Fields that are left out at their default, so that fingerprint and phase keys stay as before these fields existed."""

    def result_fields(self) -> dict[str, Any]:
        """The section as JSON values without runtime fields: the input of the phase keys and the fingerprint.

        A nested section that has only runtime fields is left out, so adding one does not change the fingerprint of a spec.
        """
        kept: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if is_runtime(field):
                continue
            value = getattr(self, name)
            if name in self.added_later and value == field.default:
                continue
            found = value.result_fields() if isinstance(value, Section) else value
            if not (isinstance(value, Section) and not found):
                kept[name] = found
        return kept


class DataConfig(Section):
    """The dataset, and which songs count as faulty. Phases stage and features."""

    added_later = frozenset({"scale"})

    source: str = Field(
        description="folder with audio and songs.csv, or DEAM, EmoMusic or PMEmo; file://…, s3://BUCKET/PREFIX; generated:N: "
        "N generated songs",
        min_length=1,
    )
    copy_songs: Literal["auto", "always", "never"] = runtime_field(
        "auto",
        "copy the songs of a folder into scratch; auto: unless both are on the same file system",
        alias="copy",  # pydantic's models have a method `copy`
    )
    manifest: str | None = runtime_field(
        None, "JSON file of sizes and SHA-256 to verify the source's files against; not given: its dataset.json"
    )
    scale: tuple[float, float] | None = Field(
        None, description="lowest and highest rating of songs.csv, such as [1, 9]; the scales of other layouts are known"
    )
    faults: Literal["fail", "drop"] = Field(
        "fail", description="invalid labels or audio: fail with a report of all, or drop these songs and list them"
    )
    drop_at_most: Fraction = Field(0.05, description="faults: drop: largest share of the songs that may be left out")
    shortest_seconds: float = Field(5.0, ge=0, description="a shorter song is a fault")
    longest_seconds: float = Field(1200.0, gt=0, le=36000, description="a longer song is a fault; decoding stops there")
    excerpt_seconds: float | None = Field(
        None,
        gt=0,
        description="length of excerpts, 45 for DEAM (its ids above 2000 are full songs): over a second shorter is a fault; not "
        "given: any length",
    )
    silence_db: float = Field(
        -60.0, le=0, description="a song with an RMS about its mean below this, in dB (0: full scale), is a fault"
    )
    largest_peak: float = Field(4.0, gt=0, description="a song with a sample beyond this (full scale: 1) is a fault")

    @model_validator(mode="after")
    def _scale_ascends(self) -> Self:
        if self.scale is not None and self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale is {list(self.scale)}, expected the lowest rating and then a higher one")
        return self


class SplitConfig(Section):
    """Training, validation and test songs. Phase split."""

    added_later = frozenset({"stratified", "out_of_fold"})

    protocol: Literal["kfold", "holdout", "lists", "column", "all"] = Field(
        "kfold",
        description="how test songs are chosen; column: by the column split of songs.csv; all: none, every song is for training",
    )
    folds: int = Field(5, ge=2, le=50, description="kfold: number of folds")
    fold: int = Field(0, ge=0, description="kfold: which fold is the test set, counted from 0")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="holdout: share of the songs that are the test set")
    validation_fraction: float = Field(0.15, gt=0, lt=1, description="share of the other songs used for validation")
    grouped: bool = Field(True, description="keep songs of one group (artist) together, if the metadata names it")
    stratified: bool = Field(False, description="kfold, holdout: spread valence and arousal evenly over the splits")
    lists: str | None = Field(None, description="lists: folder with train.txt, validation.txt, test.txt of song ids")
    out_of_fold: str | None = Field(
        None, description="all: the out_of_fold.json that `collect` has written of a complete set of folds"
    )
    seed: int = Field(
        0, ge=0, description="shuffles the songs; separate from seed, so that runs of several seeds share their folds"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.protocol == "kfold" and self.fold >= self.folds:
            raise ValueError(f"fold is {self.fold}, but with {self.folds} folds it must be 0 to {self.folds - 1}")
        if (self.protocol == "lists") != (self.lists is not None):
            raise ValueError("lists must be given if protocol is 'lists', and only then")
        if (self.protocol == "all") != (self.out_of_fold is not None):
            raise ValueError(
                "out_of_fold must be given if protocol is 'all', and only then: `emotion-job collect` of all folds writes it "
                "and, beside it, a spec with both"
            )
        return self


class MelConfig(Section):
    """Log-mel spectrograms. Phase features."""

    sample_rate_hz: int = Field(22050, ge=4000, le=96000, description="audio is resampled to this rate")
    window_samples: int = Field(2048, ge=64, le=65536, description="length of the Hann window of the Fourier transform")
    hop_samples: int = Field(512, ge=16, description="samples from the start of one frame to that of the next")
    mels: int = Field(128, ge=16, le=1024, description="number of mel bands")
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
        """Number of frames in a clip of this length."""
        return 1 + int(seconds * self.sample_rate_hz) // self.hop_samples


class InitConfig(Section):
    """Warm start from a published run. Phases gan and vit."""

    run: str = Field(
        description="a published run to start from, a folder or s3://…; without this section there is no warm start", min_length=1
    )
    gan: bool = Field(True, description="warm start of generator and discriminator")
    vit: bool = Field(True, description="warm start of the ViT with its head; vit.weights must be left out")
    normalisation: Literal["kept", "new"] = Field(
        "kept", description="kept from the run, or new from this split's training songs"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not (self.gan or self.vit):
            raise ValueError("gan and vit are both false, so nothing starts from the run; leave the section out")
        return self


class GanConfig(Section):
    """Training of the GAN. Phase gan."""

    epochs: float = Field(150.0, gt=0, description="passes over the training songs")
    batch_size: int = Field(48, ge=1, description="effective batch: songs per optimizer step")
    micro_batch: int | None = runtime_field(
        None, "songs per forward pass; not given: as many as should fit the GPU, on a CPU the whole batch", ge=1
    )
    clip_seconds: float = Field(10.0, ge=0.25, description="length of a real or synthetic clip, rounded up to 16 frames")
    latent: int = Field(64, ge=1, description="dimensions of the latent vector")
    width: int = Field(32, ge=4, description="channels at half resolution, doubled at each coarser resolution")
    generator_learning_rate: float = Field(2e-4, gt=0, description="of Adam, constant")
    discriminator_learning_rate: float = Field(2e-4, gt=0, description="of Adam, constant")
    penalty_weight: float = Field(1.0, ge=0, description="gamma of the R1 and R2 gradient penalties")
    penalty_every_steps: int = Field(4, ge=1, description="R1 and R2 are taken every n-th step, n times as strong")
    matching_weight: float = Field(
        0.0, ge=0, description="of a loss for clips with the label of another song (Reed et al. 2016, GAN-CLS); 0: left out"
    )
    ema_decay: float = Field(0.995, ge=0, lt=1, description="of the generator's weights; ramped up from 0")
    clear_cache_every_steps: int = runtime_field(0, "return unused GPU memory every n steps; 0 (best): never", ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.matching_weight and self.batch_size < 2:
            raise ValueError(
                f"matching_weight {self.matching_weight:g} takes labels of other songs of a batch: batch_size must be at least 2"
            )
        return self


class SynthConfig(Section):
    """Synthetic clips for the ViT. Phase synth."""

    added_later = frozenset({"candidates", "read_share"})

    songs: int = Field(1600, ge=4, description="number of synthetic clips")
    label_spread: float = Field(1.0, gt=0, description="bandwidth of the label density in units of Scott's rule")
    candidates: int = Field(
        1, ge=1, le=16, description="clips made for each label; the one is kept for which a regressor predicts the nearest label"
    )
    read_share: Fraction = Field(
        0.0, description="how far the label of a clip is moved towards a regressor's prediction for it; 1: all the way"
    )
    samples: tuple[Point, ...] = Field(
        ((-0.8, -0.6), (0.8, 0.7), (-0.3, 0.8), (0.5, -0.5), (0.0, 0.0)),
        description="(valence, arousal) of the clips written as wav and png",
        max_length=64,
    )
    griffin_lim_iterations: int = Field(32, ge=1, description="iterations of phase reconstruction")

    @property
    def needs_reader(self) -> bool:
        """Whether a regressor selects clips or corrects their labels."""
        return self.candidates > 1 or self.read_share > 0


class QualityConfig(Section):
    """Measures of the synthetic clips. Phase quality."""

    components: int = Field(16, ge=2, description="largest number of principal components in which distances are taken")


class VitConfig(Section):
    """Training of the ViT. Phase vit."""

    added_later = frozenset({"weights_mel", "depth", "synthetic", "teacher"})

    model: str = Field("vit_tiny_patch16_224", description="any ViT of timm, without a weights tag")
    weights: str = Field(
        "pretrained",
        description="pretrained (timm's own), a timm tag, a folder, a file of safetensors or torch (also s3://…), or random",
        min_length=1,
    )
    weights_mel: Literal["same", "other"] = Field(
        "same",
        description="weights that were trained on spectrograms: refused unless theirs are known to equal mel; other: accepted",
    )
    depth: int | None = Field(
        None,
        ge=1,
        description="number of the model's blocks that are kept, from the first on; not given: all. Half of a pretrained "
        "network can be better than all of it, at half the cost",
    )
    clip_seconds: float = Field(10.0, gt=0, description="length of a crop")
    image_size: tuple[Size, Size] | None = Field(
        None, description="resize (mels, frames) to this height and width; not given: no resizing"
    )
    channels: Literal[1, 3] = Field(1, description="input channels; 3: the log-mel three times, as in the notebook")
    epochs: float = Field(30.0, ge=0, description="maximum number of passes over the real training songs; 0: only a linear probe")
    patience_epochs: int = Field(8, ge=1, description="stop after this many epochs without a better validation CCC")
    batch_size: int = Field(32, ge=2, description="effective batch: real and synthetic clips per optimizer step")
    micro_batch: int | None = runtime_field(
        None, "clips per forward pass; not given: as many as should fit the GPU, on a CPU the whole batch", ge=1
    )
    recomputed_blocks: int = runtime_field(
        0,
        "activation checkpointing: how many of the first blocks are computed again in the backward pass; less memory, more time",
        ge=0,
    )
    learning_rate: float = Field(5e-5, gt=0, description="of the head; falls by layer_decay with each layer below")
    layer_decay: float = Field(0.75, gt=0, le=1, description="ratio of the learning rates of a layer and the one above")
    weight_decay: float = Field(0.05, ge=0, description="of AdamW; not for biases, norms and embeddings")
    warmup_fraction: Fraction = Field(0.05, description="share of the steps with a rising learning rate; then a cosine")
    frozen_epochs: float = Field(0.0, ge=0, description="epochs in which only the head and the last norm are trained")
    unfreeze_epochs: float = Field(0.0, ge=0, description="epochs over which the blocks then unfreeze, from the top")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth of the last block, linear from 0")
    head_dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the last linear layer")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the weights; ramped up from 0")
    ccc_weight: Fraction = Field(0.5, description="w in the loss w (1 - CCC) + (1 - w) MSE / label variance")
    mixup_alpha: float = Field(0.2, ge=0, description="a in C-Mixup's Beta(a, a); 0: off")
    mixup_bandwidth: float = Field(0.2, gt=0, description="C-Mixup: kernel width for choosing partners, in label units")
    time_masks: int = Field(2, ge=0, description="SpecAugment: masked spans of frames per clip")
    time_mask_seconds: float = Field(0.7, gt=0, description="SpecAugment: longest time mask")
    mel_masks: int = Field(2, ge=0, description="SpecAugment: masked spans of mel bands per clip")
    mel_mask_bands: int = Field(15, ge=1, description="SpecAugment: widest mel mask")
    synthetic_share: float = Field(0.25, ge=0, lt=1, description="share of synthetic clips in each batch")
    synthetic: Literal["always", "auto"] = Field(
        "always",
        description="auto: train without and with synthetic clips, at twice the cost, and keep those only where they raise the "
        "CCC of the validation songs by more than two standard errors",
    )
    max_crops: int = Field(16, ge=1, description="maximum number of crops per song in test and predict; 2 in validations")
    teacher: str | None = Field(
        None,
        description="file of embeddings of the songs, .npz or .safetensors (also s3://…), which the ViT also learns to predict",
    )
    teacher_weight: float = Field(
        1.0, gt=0, description="weight of the loss of the embeddings, relative to the loss of the labels"
    )

    @property
    def weights_file(self) -> str | None:
        """Path or URL of the file that `weights` names; None for a word or a timm tag, which have no slash."""
        if "/" not in self.weights:
            return None
        is_file = self.weights.endswith(WEIGHTS_SUFFIXES) or Path(self.weights).is_file()
        return self.weights if is_file else f"{self.weights}/model.safetensors"

    @property
    def synthetic_per_batch(self) -> int:
        return round(self.synthetic_share * self.batch_size)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epochs == 0 and (self.weights == "random" or self.synthetic_share > 0 or self.teacher is not None):
            raise ValueError(
                f"epochs 0 is only a linear probe: it needs pretrained weights, synthetic_share 0 and no teacher, found weights "
                f"{self.weights!r}, synthetic_share {self.synthetic_share:g}, teacher {self.teacher!r}"
            )
        if self.batch_size - self.synthetic_per_batch < 2:
            raise ValueError(f"synthetic_share {self.synthetic_share:g} leaves fewer than 2 of {self.batch_size} clips real")
        if self.synthetic == "auto" and self.synthetic_per_batch == 0:
            raise ValueError(
                f"synthetic is auto, but synthetic_share {self.synthetic_share:g} puts none into a batch of {self.batch_size}"
            )
        return self

    def result_fields(self) -> dict[str, Any]:
        found = super().result_fields()
        if self.teacher is None:  # as in specs from before the key existed
            found.pop("teacher_weight")
        return found


class EvaluateConfig(Section):
    """Metrics on the test songs. Phase evaluate."""

    bootstrap_samples: int = Field(2000, ge=100, description="resamples of the groups of test songs for each 95 % interval")
    raters_per_excerpt: int = Field(
        10, ge=2, description="raters of each excerpt, where songs.csv has no number; for the ceiling"
    )
    raters_per_full_song: int = Field(
        5, ge=2, description="raters of each of DEAM's full songs, with ids above 2000; for the ceiling"
    )


class DeviceConfig(Section):
    """Where the phases compute."""

    kind: Literal["auto", "cpu", "cuda"] = runtime_field(
        "auto", "auto: a GPU if there is one; one that cannot be used is an error"
    )
    threads: int | None = runtime_field(None, "CPU threads; not given: all that the process may use", ge=1, le=MOST_THREADS)
    deterministic: bool | None = runtime_field(None, "same bytes in every run; not given: yes on a CPU, no on a GPU")
    gpu_memory_gib: float | None = runtime_field(
        None, "limit of the GPU memory; not given: all of it. CPU memory is not limited", gt=0
    )


class CheckpointConfig(Section):
    """Checkpoints of the phases gan and vit."""

    every_seconds: float = runtime_field(30.0, "time between checkpoints", ge=0)
    keep: int = runtime_field(2, "number of newest checkpoints that are kept", ge=1)
    mirror: str | None = runtime_field(
        None, "folder or s3://… for a copy of every checkpoint and finished phase, so that another machine can resume"
    )


Precision = Literal["auto", "bf16", "fp16", "fp32"]
Part = Literal["gan", "vit"]  # parts that can have a warm start
