"""Memory and CPU time of channel attention and spatial self-attention, forward and backward, each in its own process.

    python tests/bench/attention.py

Both are measured on two maps. One is that of the notebook this package replaces, [24, 64, 64, 80], where attention between
positions needs 24 x (64 x 80)² x 4 bytes = 2.34 GiB for its weights alone. The other is the map inside this package's generator
for clips of 128 mels x 1,292 frames; 24 clips would need 9.61 GiB, so only one clip is measured. Then the whole generator is
measured with either. Kept: bytes of all tensors that autograd saves for backward, each storage once, without parameters.
Growth: the highest resident memory of the process minus the resident memory before. Needs 8 GiB of memory and a minute or two.
Goals, on the notebook's map: channel attention keeps at most 1/50 of the bytes that spatial attention keeps, and needs at most
1/20 of its time.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# For importing tests.bench.rows when this file is run as a program.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from emotion.gan.networks import ChannelAttention, Generator
from emotion.proc import memory_bytes
from tests.bench.rows import record

LEAST_SECONDS = 2
MIB = 2**20
MELS, FRAMES, LATENT, WIDTH = 128, 1292, 64, 32
NOTEBOOK_MAP = (64, 64, 80)
NOTEBOOK_BATCH = 24


class SpatialAttention(nn.Module):
    """Every position attends to every other. Source: Zhang et al. 2019 (SAGAN), section 3, with the full attention matrix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=2)  # [batch, positions, positions]
        attended = weights @ value.transpose(1, 2)
        return x + self.gamma * attended.transpose(1, 2).unflatten(2, x.shape[2:])


MODULES = {"channel": ChannelAttention, "spatial": SpatialAttention}


@dataclass
class Measured:
    kept: int
    growth: int
    milliseconds: float


def measure(network: nn.Module, *inputs: Tensor | int) -> Measured:
    """Run forward and backward for LEAST_SECONDS: the memory of the first round, and the time of the fastest round."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}  # address → bytes; nothing is freed before backward, so addresses are unique

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    times: list[float] = []
    growths: list[int] = []
    resident = memory_bytes("VmRSS")
    assert resident is not None, "this benchmark needs Linux"
    while sum(times) < 1000 * LEAST_SECONDS:
        started = time.process_time()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = network(*inputs)
        total = sum(kept.values())
        kept.clear()
        output.sum().backward()
        times.append(1000 * (time.process_time() - started))
        growths.append(memory_bytes("VmHWM") - resident)
        del output
    return Measured(total, growths[0], min(times))


def measure_module(name: str, batch: int, shape: tuple[int, int, int]) -> Measured:
    torch.manual_seed(0)
    module = MODULES[name](shape[0])
    module(torch.randn(1, shape[0], 4, 4)).sum().backward()  # warm up
    return measure(module, torch.randn(batch, *shape).requires_grad_())


def generator_with(name: str) -> Generator:
    torch.manual_seed(0)
    generator = Generator(MELS, LATENT, WIDTH)
    if name == "spatial":
        generator.attention = SpatialAttention(2 * WIDTH)
    return generator


def noise(frames: int) -> Tensor:
    return torch.randn(1, LATENT, 1 + Generator.columns(frames))


def measure_generator(name: str) -> Measured:
    generator = generator_with(name)
    generator(torch.zeros(1, 2), noise(16), 16).sum().backward()
    return measure(generator, torch.zeros(1, 2), noise(FRAMES), FRAMES)


def map_in_generator() -> tuple[int, int, int]:
    """Shape [channels, rows, columns] of the input of the generator's attention."""
    shapes = []
    generator = generator_with("channel")
    generator.attention.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[1:])))
    with torch.no_grad():
        generator(torch.zeros(1, 2), noise(FRAMES), FRAMES)
    (shape,) = shapes
    return shape


def main() -> None:
    here = map_in_generator()
    spawn = multiprocessing.get_context("spawn")
    print(f"float32, forward + backward, one thread, CPU time: the least in {LEAST_SECONDS} s of rounds\n")
    print("| module | map | batch | kept, bytes | growth, MiB | ms |")
    print("|---|---|---|---|---|---|")

    def row(name: str, batch: int, shape: tuple[int, ...], result: Measured) -> None:
        numbers = f"{result.kept:,} | {result.growth / MIB:.0f} | {result.milliseconds:.0f}"
        print(f"| {name} | {' x '.join(map(str, shape))} | {batch} | {numbers} |", flush=True)

    results = {}
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:  # a new process for each task
        for batch, shape in ((NOTEBOOK_BATCH, NOTEBOOK_MAP), (1, here)):
            for name in MODULES:
                results[name, shape] = pool.submit(measure_module, name, batch, shape).result()
                row(name, batch, shape, results[name, shape])
        for name in MODULES:
            row(f"generator, {name}", 1, (MELS, FRAMES), pool.submit(measure_generator, name).result())

    for name, batch, shape in (("notebook", NOTEBOOK_BATCH, NOTEBOOK_MAP), ("generator", 1, here)):
        weights = 4 * (shape[1] * shape[2]) ** 2
        channel, spatial = results["channel", shape], results["spatial", shape]
        print(
            f"\n{name}'s map: one attention matrix for {batch} clips {batch * weights:,} bytes, for {NOTEBOOK_BATCH} clips "
            f"{NOTEBOOK_BATCH * weights / 2**30:.2f} GiB"
        )
        print(
            f"channel / spatial: kept 1/{spatial.kept / channel.kept:.0f}, growth 1/{spatial.growth / channel.growth:.0f}, "
            f"time 1/{spatial.milliseconds / channel.milliseconds:.0f}"
        )
        goals = (1 / 50, 1 / 20) if name == "notebook" else (None, None)
        what = "of channel attention / of spatial attention"
        record(f"memory kept for backward, {name}'s map, {what}", channel.kept / spatial.kept, most=goals[0])
        record(f"CPU time, {name}'s map, {what}", channel.milliseconds / spatial.milliseconds, most=goals[1])


if __name__ == "__main__":
    main()
