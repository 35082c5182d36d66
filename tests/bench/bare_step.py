"""The limits that tests/bench/gpu.py compares with: a training step of a ViT and nothing else, and the timing of calls."""

import time
from collections.abc import Callable
from typing import Any


def bare_vit_step(device: Any, model: str, batch: int, shape: tuple[int, int, int], graph: bool) -> float:
    """Seconds of a training step in bf16 without data, augmentation, EMA or checks."""
    import torch
    import torch.nn.functional as F

    from emotion.compat import timm

    network = timm.create_model(model, in_chans=shape[0], num_classes=2, img_size=shape[1:]).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-5, fused=True, capturable=graph)
    x, y = torch.randn(batch, *shape, device=device), torch.randn(batch, 2, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=not graph)
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.mse_loss(network(x).float(), y)
        loss.backward()
        optimizer.step()

    run: Callable[[], object] = step
    if graph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        run = captured.replay
    return seconds_of(run, device, 3 if device.type == "cpu" else 40)


def seconds_of(call: Callable[[], object], device: Any, times: int) -> float:
    """Mean seconds of `call`, of `times` after a quarter as many to warm up; all work of the device is awaited."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(max(1, times // 4)):
        call()
    wait()
    started = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - started) / times
