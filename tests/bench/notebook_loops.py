"""The training loops of the notebook that this package replaces, as a baseline for speeds.

Each returns seconds per step and the peak of the allocator. They keep the notebook's faults: the loader's workers resize clips
one by one, `.item()` at every step, the cache is cleared at every fifth step, BatchNorm, D is trained twice as often as G.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, Dataset, TensorDataset

from emotion.compat import timm

VIT_BATCH, GAN_BATCH = 12, 24
MELS, FRAMES = 128, 1292


@dataclass
class Measured:
    seconds_per_step: float
    peak_bytes: int


class Timer:
    """Measures seconds per step, from step `first` on."""

    def __init__(self, device: torch.device, first: int) -> None:
        self.device, self.first, self.steps, self.started = device, first, 0, 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def step(self) -> None:
        """Call it before each step."""
        if self.steps == self.first:
            self._wait()
            self.started = time.perf_counter()
        self.steps += 1

    def result(self) -> Measured:
        self._wait()
        seconds = (time.perf_counter() - self.started) / (self.steps - self.first)
        return Measured(seconds, torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Random spectrograms. When read, each is scaled by its own extremes, resized and converted to RGB."""

    def __init__(self, clips: int, frames: int) -> None:
        rng = np.random.default_rng(0)
        self.clips = rng.standard_normal((clips, MELS, frames), np.float32)
        self.labels = rng.standard_normal((clips, 2), np.float32)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        clip = torch.from_numpy(self.clips[index])
        clip = (clip - clip.min()) / (clip.max() - clip.min() + 1e-8)
        picture = F.interpolate(clip[None, None], size=(224, 224), mode="bilinear", align_corners=False)[0].repeat(3, 1, 1)
        mean, sd = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (picture - mean[:, None, None]) / sd[:, None, None], torch.from_numpy(self.labels[index])


class Regressor(nn.Module):
    def __init__(self, model: str) -> None:
        super().__init__()
        self.vit = timm.create_model(model, num_classes=0, img_size=224)
        width = self.vit.num_features
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 2))

    def forward(self, x: Tensor) -> Tensor:
        predicted: Tensor = self.head(self.vit(x))
        return predicted


def vit_loop(device: torch.device, *, model: str, clips: int, steps: int, amp: bool) -> Measured:
    """Train the ViT on 224 x 224 RGB, batch 12, with AMP in fp16 (on a CPU in fp32)."""
    network = Regressor(model).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-5)
    amp = amp and device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=amp)
    timer, total = Timer(device, first=min(15, steps // 2)), 0.0
    loader = DataLoader(
        Pictures(clips, FRAMES), batch_size=VIT_BATCH, shuffle=True, num_workers=2, pin_memory=device.type == "cuda"
    )
    while timer.steps < steps:
        for pictures, labels in loader:
            timer.step()
            x, y = pictures.to(device), labels.to(device)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.float16, enabled=amp):
                loss = F.mse_loss(network(x).float(), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            total += loss.item()
            if timer.steps % 5 == 0:
                torch.cuda.empty_cache()
            if timer.steps == steps:
                break
    return timer.result()


class ChannelGate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, channels // 8), nn.ReLU(), nn.Linear(channels // 8, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc(x.mean((2, 3))) + self.fc(x.amax((2, 3)))
        return x * gate[:, :, None, None]


class NotebookGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.Linear(2, 128), nn.LeakyReLU(0.2), nn.Linear(128, 256), nn.LeakyReLU(0.2))
        self.fc = nn.Sequential(nn.Linear(356, 81920), nn.BatchNorm1d(81920), nn.LeakyReLU(0.2))
        layers: list[nn.Module] = []
        for inputs, outputs in ((256, 128), (128, 64), (64, 32)):
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
            if outputs == 64:
                layers.append(ChannelGate(outputs))
        self.up = nn.Sequential(*layers, nn.ConvTranspose2d(32, 1, (1, 8), (1, 8)), nn.Tanh())

    def forward(self, noise: Tensor, labels: Tensor, frames: int) -> Tensor:
        x = self.fc(torch.cat([noise, self.condition(labels)], 1)).view(-1, 256, 16, 20)
        return F.interpolate(self.up(x), size=(MELS, frames), mode="bilinear", align_corners=False)


class NotebookDiscriminator(nn.Module):
    def __init__(self, frames: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, 128), (128, 256)):
            layers.append(spectral_norm(nn.Conv2d(inputs, outputs, 4, 2, 1)))
            if inputs > 1:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(nn.LeakyReLU(0.2))
        self.convolutions = nn.Sequential(*layers)
        self.condition = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2))
        size = 256 * (MELS // 16) * (frames // 16)
        self.out = nn.Sequential(nn.Linear(size + 64, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(256, 1))

    def forward(self, clips: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.cat([self.convolutions(clips).flatten(1), self.condition(labels)], 1))
        return logits


def gan_loop(device: torch.device, *, clips: int, frames: int, steps: int) -> Measured:
    """Train the conditional GAN in fp32, batch 24: D twice and G once per batch, each optimizer steps at every second batch."""
    G, D = NotebookGenerator().to(device), NotebookDiscriminator(frames).to(device)
    g_opt = torch.optim.Adam(G.parameters(), 2e-4, betas=(0.5, 0.999))
    d_opt = torch.optim.Adam(D.parameters(), 1e-4, betas=(0.5, 0.999))
    bce = nn.BCEWithLogitsLoss()
    rng = np.random.default_rng(0)
    real = torch.from_numpy(rng.standard_normal((clips, 1, MELS, frames), np.float32))
    data = TensorDataset(real, torch.from_numpy(rng.standard_normal((clips, 2), np.float32)))
    loader = DataLoader(data, batch_size=GAN_BATCH, shuffle=True, num_workers=2, drop_last=True)
    timer = Timer(device, first=min(10, steps // 2))
    while timer.steps < steps:
        for pictures, given in loader:
            timer.step()
            x, y = pictures.to(device), given.to(device)
            one, zero = torch.ones(GAN_BATCH, 1, device=device), torch.zeros(GAN_BATCH, 1, device=device)
            for _ in range(2):
                fake = G(torch.randn(GAN_BATCH, 100, device=device), y, frames).detach()
                d_loss = (bce(D(x, y), one) + bce(D(fake, y), zero)) / 2
                d_loss.backward()
                d_loss.item()
            if timer.steps % 2 == 0:
                d_opt.step()
                d_opt.zero_grad()
            g_loss = bce(D(G(torch.randn(GAN_BATCH, 100, device=device), y, frames), y), one) / 2
            g_loss.backward()
            g_loss.item()
            if timer.steps % 2 == 0:
                g_opt.step()
                g_opt.zero_grad()
            if timer.steps % 5 == 0:
                torch.cuda.empty_cache()
            if timer.steps == steps:
                break
    return timer.result()
