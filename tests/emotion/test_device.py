import json
from collections.abc import Iterator

import pytest
import torch

from emotion.config import DeviceConfig
from emotion.device import Device, ResolvedPrecision, cap_memory, resolve_device
from emotion.errors import ModelError

CPU = DeviceConfig(kind="cpu", threads=1)
HAS_BF16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@pytest.fixture(autouse=True)
def switches_as_before() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_auto_takes_bf16_on_a_cpu_that_multiplies_in_it_and_fp32_on_any_other() -> None:
    assert resolve_device(CPU, "auto").precision == ("bf16" if HAS_BF16 else "fp32")


def test_bf16_is_taken_or_refused_as_the_cpu_can() -> None:
    if HAS_BF16:
        assert resolve_device(CPU, "bf16").precision == "bf16"
    else:
        with pytest.raises(ModelError, match="does not compute in bf16"):
            resolve_device(CPU, "bf16")


def test_fp16_on_a_cpu_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match="Set precision to auto or fp32"):
        resolve_device(CPU, "fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_when_asked_for_and_not_missed_by_auto() -> None:
    with pytest.raises(ModelError, match="no usable GPU"):
        resolve_device(DeviceConfig(kind="cuda"), "fp32")
    assert resolve_device(DeviceConfig(kind="auto", threads=1), "fp32").device.type == "cpu"


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_computes_with_the_threads_that_were_asked_for(threads: int) -> None:
    device = resolve_device(DeviceConfig(kind="cpu", threads=threads), "fp32")
    assert device.threads == torch.get_num_threads() == threads


@pytest.mark.parametrize(("asked", "expected"), [(None, True), (True, True), (False, False)])
def test_a_cpu_is_deterministic_unless_told_otherwise(asked: bool | None, expected: bool) -> None:
    device = resolve_device(DeviceConfig(kind="cpu", threads=1, deterministic=asked), "fp32")
    assert device.deterministic is torch.are_deterministic_algorithms_enabled() is expected


def test_deterministic_mode_spares_filling_fresh_memory() -> None:
    resolve_device(CPU, "fp32")
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_multiplies_in_the_resolved_precision(precision: ResolvedPrecision, dtype: torch.dtype) -> None:
    # Made by hand: torch emulates what this CPU may lack.
    device = Device(torch.device("cpu"), precision, threads=1, deterministic=True)
    with device.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(("precision", "scaled"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_the_loss_is_scaled_for_fp16_only(precision: ResolvedPrecision, scaled: bool) -> None:
    device = Device(torch.device("cpu"), precision, threads=1, deterministic=True)
    assert (device.scaler().scale(torch.tensor(3.0)).item() != 3) is scaled


def test_a_scalers_state_goes_on_in_its_own_precision_and_is_left_behind_by_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fp16, fp32 = (Device(torch.device("cpu"), precision, 1, True) for precision in ("fp16", "fp32"))
    scaler = fp16.scaler()
    scaler.scale(torch.tensor(1.0))
    scaler.update(1024.0)
    resumed = fp16.scaler()
    resumed.load_state_dict(scaler.state_dict())
    assert resumed.scale(torch.tensor(1.0)).item() == 1024
    fp32.scaler().load_state_dict(fp32.scaler().state_dict())
    assert not caplog.records

    begins, ends = fp16.scaler(), fp32.scaler()
    begins.load_state_dict(fp32.scaler().state_dict())
    ends.load_state_dict(scaler.state_dict())
    assert begins.scale(torch.tensor(1.0)).item() == fp16.scaler().scale(torch.tensor(1.0)).item()
    assert ends.scale(torch.tensor(1.0)).item() == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.ones(3)
    assert resolve_device(CPU, "fp32").send(tensor) is tensor


def test_the_description_is_json_and_says_what_was_resolved() -> None:
    facts = json.loads(json.dumps(resolve_device(CPU, "fp32").describe(), allow_nan=False))
    assert (facts["kind"], facts["precision"], facts["threads"], facts["deterministic"]) == ("cpu", "fp32", 1, True)
    assert facts["cpu"]
    assert facts["machine"]


def test_a_cap_above_what_the_gpu_has_is_refused() -> None:
    with pytest.raises(ModelError, match=r"gpu_memory_gib is 20, but this GPU has 16\.0 GiB"):
        cap_memory(20 << 30, 16 << 30)


def test_on_a_cpu_a_cap_is_only_told() -> None:
    config = DeviceConfig(kind="cpu", threads=1, gpu_memory_gib=2.5)
    assert resolve_device(config, "fp32").describe()["gpu_memory_cap_gib"] == 2.5
    assert resolve_device(config, "fp32").free_bytes() is None
