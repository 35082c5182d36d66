"""No step of a training makes the host wait for the device."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emotion.config import CheckpointConfig, DeviceConfig, GanConfig, VitConfig
from emotion.data.leaks import write_seen
from emotion.gan.memory import gan_backoff
from emotion.gan.train import train_gan
from emotion.training.device import Device, resolve_device
from emotion.training.graphed_step import CudaGraphs, GraphBackend
from emotion.vit.memory import vit_backoff
from emotion.vit.train import train_vit
from tests.emotion.operators import HostReads, Operators
from tests.emotion.trainings import CPU, SMALL_GAN, SMALL_MEL, SMALL_VIT, context, partition, write_songs

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """train("gan", out, device, asked, reads): a training of 6 steps, of the GAN with penalties in every second one, of the ViT
    while layers thaw; "taught": of the ViT with a teacher. asked: called after each step, with its number. reads: gets what
    copies to the host within a step."""
    real = write_songs(tmp_path_factory.mktemp("real"), SMALL_MEL, 26, seed=10)
    synthetic = write_songs(tmp_path_factory.mktemp("synthetic"), SMALL_MEL, 5, seed=5, synthetic=True)
    write_seen(synthetic.folder, {"file 0", "sound 0"})
    songs = partition(real.only(range(24)), real.only([24, 25]))
    teacher = tmp_path_factory.mktemp("teacher") / "embeddings.npz"
    embedding = np.random.default_rng(0).standard_normal((len(real.songs), 7))
    np.savez(teacher, names=[str(song.song_id) for song in real.songs], embedding=embedding)

    def train(
        phase: str, out: Path, device: Device, asked: Callable[[int], None], reads: list[str], graphs: GraphBackend | None = None
    ) -> None:
        questions = 0

        def should_stop() -> bool:
            nonlocal questions
            questions += 1
            asked(questions)
            return False

        given = replace(context(out, should_stop, CheckpointConfig(every_seconds=3600)), device=device, graphs=graphs)
        # Two micro-batches, as a GPU with little memory takes them.
        if phase == "gan":
            gan = GanConfig.model_validate(SMALL_GAN.model_dump() | {"epochs": 1.5, "micro_batch": 3})
            backoff = gan_backoff(partition(songs.training), gan, device)
            backoff.measure = lambda *_: HostReads(reads)  # type: ignore[method-assign]
            backoff.run(lambda: train_gan(partition(songs.training), config=gan, context=given, backoff=backoff))
        else:
            thawing = {"epochs": 1, "micro_batch": 3, "frozen_epochs": 0.3, "unfreeze_epochs": 0.4}
            taught = {"teacher": str(teacher)} if phase == "taught" else {}
            vit = VitConfig.model_validate(SMALL_VIT.model_dump() | thawing | taught)
            backoff = vit_backoff(songs, synthetic, vit, device)
            backoff.measure = lambda *_: HostReads(reads)  # type: ignore[method-assign]
            backoff.run(lambda: train_vit(songs, synthetic=synthetic, config=vit, context=given, backoff=backoff))

    return train


@pytest.mark.parametrize("phase", ["gan", "vit", "taught"])
def test_no_step_waits_for_a_number_or_for_a_shape(phase: str, train: Callable[..., None], tmp_path: Path) -> None:
    """Among them steps whose numbers are recorded: with so few steps that is each of them."""
    operators = Operators()
    reads: list[str] = []
    seen: list[int] = []
    active = contextlib.ExitStack()

    def asked(step: int) -> None:
        seen.append(step)
        if step == 1:  # what a process does in its first step it does once
            active.enter_context(operators)
        elif step == STEPS - 1:
            active.close()

    with active:
        train(phase, tmp_path, CPU, asked, reads)
    assert seen[:STEPS] == list(range(1, STEPS + 1))
    assert len(operators.names) > 1000
    assert operators.waits == []
    assert reads == []


def test_what_makes_a_host_wait_is_recognised() -> None:
    x, reads = torch.arange(3.0), []
    with Operators() as operators, HostReads(reads):
        waiting: list[Callable[[], Any]] = [
            x.nonzero,
            x[0].item,
            lambda: x[x > 1],
            lambda: torch.unique(x),
            lambda: bool(x[0] > 1),
        ]
        waiting += [lambda: x.masked_select(x > 1), lambda: torch.equal(x, x + 1), x.tolist, x.cpu, lambda: float(x[1])]
        for wait in waiting:
            before = len(operators.waits) + len(reads)
            wait()
            assert len(operators.waits) + len(reads) > before, wait
        operators.waits.clear(), reads.clear()
        (x[torch.tensor([2, 0])] * 2).sum().add_(x[1]).clamp(max=1)
    assert operators.waits == reads == []


@pytest.fixture
def gpu() -> Iterator[Device]:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield resolve_device(DeviceConfig(kind="cuda", deterministic=False), "auto")
    torch.cuda.set_sync_debug_mode("default")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("makes_graphs", [False, True])
@pytest.mark.parametrize("phase", ["gan", "vit", "taught"])
def test_no_step_waits_for_the_gpu(
    phase: str, makes_graphs: bool, gpu: Device, train: Callable[..., None], tmp_path: Path
) -> None:
    def asked(step: int) -> None:
        if step == 1:
            torch.cuda.set_sync_debug_mode("error")
        elif step == STEPS - 1:
            torch.cuda.set_sync_debug_mode("default")

    train(phase, tmp_path, gpu, asked, [], CudaGraphs() if makes_graphs else None)
