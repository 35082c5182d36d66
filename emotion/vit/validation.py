"""Validation of a ViT epoch: the same crops of all validation songs and of some training songs in every epoch.

The cost, in forward passes of one clip: in training a clip costs about three, as a backward pass costs two. With `deam.yaml` an
epoch trains 26 batches of 64 clips, 4,992, and validates two crops each of 216 validation songs and 108 training songs, 648. That
is 12 % of all; the training songs alone cost 4 % of an epoch. Test songs get all their crops, up to `vit.max_crops`.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from emotion.audio.feature_store import Features
from emotion.audio.partition import TrainingSongs, ValidationSongs
from emotion.errors import Interrupted
from emotion.evaluation.metrics import validation_concordance
from emotion.training.context import TrainingContext
from emotion.training.seeding import generator
from emotion.vit.crops import crops_per_forward, mean_over_crops
from emotion.vit.network import Array, Preprocessing

CROPS = 2  # of a song, at most
FEWEST_PROBED = 32
MICRO_BATCHES = 4
"""Largest number per forward pass: without a graph it holds the tensors of one block only, a training step those of all."""


def probe_of(training: TrainingSongs, validation: ValidationSongs, seed: int) -> Features:
    """Training songs whose CCC is compared with that of the validation songs: half as many, from FEWEST_PROBED to as many."""
    songs = min(len(validation.songs), max(len(validation.songs) // 2, FEWEST_PROBED))
    chosen = generator(seed, "vit", "probe").permutation(len(training.songs))[:songs]
    return training.only(chosen.tolist())


def validate(
    network: nn.Module,
    preprocessing: Preprocessing,
    validation: ValidationSongs,
    probe: Features,
    *,
    context: TrainingContext,
    micro_batch: int,
) -> dict[str, float]:
    """CCCs of validation songs and of the probe, as named in metrics.jsonl. Raises Interrupted when asked to stop.

    micro_batch: of the training, which limits the size of a forward pass.
    """
    predicted = predictions(network, preprocessing, [validation, probe], context=context, micro_batch=micro_batch, crops=CROPS)
    of_validation, of_probe = predicted[: len(validation.songs)], predicted[len(validation.songs) :]
    valence, arousal = (validation_concordance(of_validation[:, column], validation.labels[:, column]) for column in (0, 1))
    return {
        "validation_ccc_valence": valence,
        "validation_ccc_arousal": arousal,
        "validation_ccc": (valence + arousal) / 2,
        "training_ccc": sum(validation_concordance(of_probe[:, column], probe.labels[:, column]) for column in (0, 1)) / 2,
    }


def predictions(
    network: nn.Module,
    preprocessing: Preprocessing,
    songs: Sequence[Features],
    *,
    context: TrainingContext,
    micro_batch: int,
    crops: int | None = None,
) -> Array:
    """[songs, 2] valence and arousal in [-1, 1] of all songs: see `means_over_crops`."""
    return means_over_crops(network, preprocessing, songs, context=context, micro_batch=micro_batch, crops=crops).clip(-1, 1)


def means_over_crops(
    network: Callable[[Tensor], Tensor],
    preprocessing: Preprocessing,
    songs: Sequence[Features],
    *,
    context: TrainingContext,
    micro_batch: int,
    crops: int | None = None,
) -> Array:
    """[songs, outputs] of all songs, from at most `crops` crops of each. Raises Interrupted when asked to stop."""

    def check_stop() -> None:
        if context.should_stop():
            raise Interrupted("vit: stopped while songs were predicted")

    views = [some.stored(index) for some in songs for index in range(len(some.songs))]
    per_forward = min(crops_per_forward(preprocessing, context.device), MICRO_BATCHES * micro_batch)
    return mean_over_crops(
        network, preprocessing, context.device, views, check_stop=check_stop, crops=crops, per_forward=per_forward
    )
