"""The cost of the trainings of a spec: operations counted on fake tensors, and the estimated time on usual GPUs.

    python -m tests.bench.cost [SPEC …] [--songs N]

The script counts the operations of one optimizer step of the GAN with and without gradient penalties, of the synthesis of a clip,
and of one step and one forward pass of the ViT, by the formulas of torch.utils.flop_counter: a multiplication and an addition are
two operations. Each count is multiplied by the number of repetitions. Each epoch of the ViT validates two crops of every
validation song and half as many of training songs; with pretrained weights, all crops of the training songs, excerpts of 45 s,
pass through the network before. The time is a range, for a tenth to two fifths of a GPU's peak in half precision, which trainings
of such networks reach. Staging, features and everything else on the CPU are left out.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.environment import available_threads, prepare_environment

PEAK = {"T4": 65e12, "A100": 312e12, "H100": 989e12}
"""Operations per second with dense fp16 or bf16 matrices, from NVIDIA's data sheets (H100: SXM)."""
SLOW, FAST = 0.1, 0.4  # shares of the peak
SONGS, SECONDS = 1802, 45.0  # number and length of DEAM's songs
TEST = 0.2


def operations(spec_file: str, songs: int) -> dict[str, float]:
    """Number of operations of each part of a job."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    from emotion.config import DeviceConfig
    from emotion.gan import memory as gan_memory
    from emotion.gan.networks import Generator
    from emotion.training.device import resolve_device
    from emotion.training.memory_account import fake_tensors
    from emotion.training.schedule import steps_of
    from emotion.vit import memory as vit_memory
    from emotion.vit.network import identity_normalisation, network_on_meta, preprocessing_for
    from job.spec.load import load_spec

    spec = load_spec(Path(spec_file), [])
    device = resolve_device(DeviceConfig(kind="cpu"), "fp32")
    validation = songs * (1 - TEST) * spec.split.validation_fraction
    training = round(songs * (1 - TEST) - validation)

    class Counter(TorchDispatchMode):
        """A counter of operations. FlopCounterMode, which also counts by module, fails on the penalties' gradients by clips."""

        total = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            formula = flop_registry.get(function._overloadpacket)
            self.total += formula(*args, **(kwargs or {}), out_val=result) if formula else 0
            return result

    def counted(work: Callable[..., object], *arguments: Any) -> int:
        with Counter() as counter:
            work(*arguments)
        return counter.total

    gan, vit = spec.gan, spec.vit
    plain = gan.model_copy(update={"penalty_weight": 0.0})
    step, penalised = (
        counted(gan_memory.predicted_memory.__wrapped__, c, spec.mel, device, gan.batch_size) for c in (plain, gan)
    )
    gan_steps = steps_of(gan.epochs, training, gan.batch_size)
    frames = spec.mel.frames(gan.clip_seconds)
    with fake_tensors():
        G = Generator(spec.mel.mels, gan.latent, gan.width)
        noise = torch.empty(1, gan.latent, 1 + Generator.columns(frames))
        of_clip = counted(G, torch.empty(1, 2), noise, frames)

    preprocessing = preprocessing_for(vit, spec.mel, identity_normalisation(spec.mel))
    vit_step = counted(vit_memory.predicted_memory.__wrapped__, vit, spec.mel, device, vit.batch_size)
    network = network_on_meta(vit, preprocessing)
    height, width = vit.image_size or (spec.mel.mels, preprocessing.frames)
    forward = counted(network, torch.empty(1, vit.channels, height, width, device="meta"))
    probed = 0 if vit.weights == "random" else training * min(vit.max_crops, math.ceil(SECONDS / vit.clip_seconds))
    vit_steps = steps_of(vit.epochs, training, vit.batch_size - vit.synthetic_per_batch)
    return {
        "gan": gan_steps * (step + (penalised - step) / gan.penalty_every_steps),
        "synth": spec.synth.songs * spec.synth.candidates * of_clip,
        "vit": vit_steps * vit_step,
        "validation": (vit.epochs * 3 * validation + probed) * forward,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=["job/specs/deam.yaml", "job/specs/deam-t4.yaml"])
    parser.add_argument("--songs", type=int, default=SONGS)
    arguments = parser.parse_args()
    prepare_environment(available_threads())
    print("| preset | " + " | ".join(f"{part}, PFLOP" for part in ("gan", "synth", "vit", "validation")), end=" | ")
    print(" | ".join(f"{name}, minutes" for name in PEAK) + " |\n" + "|---" * (5 + len(PEAK)) + "|")
    for spec in arguments.specs:
        found = operations(spec, arguments.songs)
        total = sum(found.values())
        cells = [Path(spec).stem, *(f"{value / 1e15:.2f}" for value in found.values())]
        cells += [f"{total / peak / FAST / 60:.1f} to {total / peak / SLOW / 60:.1f}" for peak in PEAK.values()]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
