import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from emotion import proc
from emotion.config import DeviceConfig
from emotion.errors import ModelError, NodeError
from emotion.training.device import Device, ResolvedPrecision, cap_memory, computes, is_built_for, resolve_device, why_no_gpu

CPU = DeviceConfig(kind="cpu", threads=1)
HAS_BF16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@pytest.fixture(autouse=True)
def switches_as_before() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_auto_is_bf16_on_a_cpu_that_multiplies_in_it_and_else_fp32() -> None:
    assert resolve_device(CPU, "auto").precision == ("bf16" if HAS_BF16 else "fp32")


def test_bf16_is_refused_where_the_cpu_does_not_have_it() -> None:
    if HAS_BF16:
        assert resolve_device(CPU, "bf16").precision == "bf16"
    else:
        with pytest.raises(ModelError, match="does not compute in bf16"):
            resolve_device(CPU, "bf16")


def test_fp16_on_a_cpu_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match="Set precision to auto or fp32"):
        resolve_device(CPU, "fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu() -> None:
    with pytest.raises(ModelError, match="no usable GPU"):
        resolve_device(DeviceConfig(kind="cuda"), "fp32")
    assert resolve_device(DeviceConfig(kind="auto", threads=1), "fp32").device.type == "cpu"


@pytest.mark.parametrize(
    ("capability", "architectures", "built"),
    [
        ((8, 0), ["sm_75", "sm_80", "sm_90"], True),
        ((8, 9), ["sm_75", "sm_86", "sm_90"], True),  # code for a lower minor version of the same major one
        ((8, 0), ["sm_75", "sm_86", "sm_90"], False),  # but not for a higher one
        ((7, 0), ["sm_75", "sm_80"], False),
        ((9, 0), ["sm_80"], False),  # nor for another major one
        ((9, 0), ["sm_80", "compute_80"], True),  # but PTX is compiled for it on the spot
        ((7, 5), ["sm_80", "compute_80"], False),
        ((10, 3), ["sm_90", "sm_100"], True),
        ((12, 0), ["sm_100a", "sm_90a"], False),
        ((9, 0), [], False),
    ],
)
def test_a_gpu_needs_code_for_its_compute_capability(capability: tuple[int, int], architectures: list[str], built: bool) -> None:
    assert is_built_for(capability, architectures) is built


def test_a_device_that_multiplies_wrongly_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert computes(torch.device("cpu"))
    monkeypatch.setattr(torch.Tensor, "__mul__", lambda one, other: torch.zeros(2, 2, 3))
    assert not computes(torch.device("cpu"))


@pytest.fixture
def gpu_of_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """torch as a build for CUDA that finds an A100, for which it has code; computing on it fails, as there is none."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    why_no_gpu.cache_clear()
    yield monkeypatch
    why_no_gpu.cache_clear()


def refusal() -> str:
    """A NodeError on a machine that has a GPU."""
    with pytest.raises((ModelError, NodeError), match="the spec asks for cuda, and there is no usable GPU") as refused:
        resolve_device(DeviceConfig(kind="cuda"), "fp32")
    return str(refused.value)


def no_driver() -> None:
    raise RuntimeError("Found no NVIDIA driver on your system. Please check\nmore")


def test_a_driver_that_is_missing_or_too_old_is_named(gpu_of_torch: pytest.MonkeyPatch) -> None:
    gpu_of_torch.setattr(torch.cuda, "init", no_driver)
    assert "Found no NVIDIA driver on your system. Please check. Start the job where" in refusal()


def test_a_gpu_that_torch_was_not_built_for_is_named(gpu_of_torch: pytest.MonkeyPatch) -> None:
    gpu_of_torch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90", "sm_100"])
    assert f"A100 has compute capability 8.0, and torch {torch.__version__} is built for sm_90, sm_100." in refusal()


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch is built for CUDA")
def test_a_gpu_on_which_no_kernel_runs_is_refused(gpu_of_torch: pytest.MonkeyPatch) -> None:
    def no_kernel(*_arguments: object, **_keywords: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might")

    gpu_of_torch.setattr(torch, "tensor", no_kernel)
    assert "CUDA error: no kernel image is available for execution on the device. Start" in refusal()


def test_auto_does_not_take_the_cpu_for_a_gpu_that_cannot_be_used(gpu_of_torch: pytest.MonkeyPatch) -> None:
    gpu_of_torch.setattr(torch.cuda, "init", no_driver)
    with pytest.raises((ModelError, NodeError), match=r"GPU that cannot be used: Found no NVIDIA driver .* device\.kind cpu"):
        resolve_device(DeviceConfig(kind="auto", threads=1), "fp32")
    assert resolve_device(CPU, "fp32").device.type == "cpu"


@pytest.mark.parametrize("kind", ["auto", "cuda"])
def test_a_gpu_that_was_given_and_does_not_compute_is_the_nodes_fault(
    gpu_of_torch: pytest.MonkeyPatch, tmp_path: Path, kind: Literal["auto", "cuda"]
) -> None:
    gpu_of_torch.setattr(torch.cuda, "init", no_driver)
    gpu_of_torch.setattr(proc, "DEVICE_FILES", tmp_path)
    gpu_of_torch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ModelError):  # the job was given none
        resolve_device(DeviceConfig(kind="cuda"), "fp32")
    (tmp_path / "nvidia0").touch()
    with pytest.raises(NodeError, match="Found no NVIDIA driver") as refused:
        resolve_device(DeviceConfig(kind=kind), "fp32")
    assert (refused.value.exit_code, refused.value.retry_helps) == (71, True)
    gpu_of_torch.setattr(torch.version, "cuda", None)
    why_no_gpu.cache_clear()
    with pytest.raises(ModelError, match="is built for CPUs only"):  # no node would do
        resolve_device(DeviceConfig(kind=kind), "fp32")


def test_a_cpu_that_multiplies_wrongly_is_the_nodes_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda one, other: torch.zeros(2, 2))
    with pytest.raises(NodeError, match="this CPU computes wrong numbers"):
        resolve_device(CPU, "fp32")


def test_a_device_file_is_a_gpu_also_where_torch_finds_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(proc, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidiactl").touch()
    auto = DeviceConfig(kind="auto", threads=1)
    assert resolve_device(auto, "fp32").device.type == "cpu"
    (tmp_path / "nvidia0").touch()
    why_no_gpu.cache_clear()
    with pytest.raises((ModelError, NodeError), match="there is a GPU that cannot be used"):
        resolve_device(auto, "fp32")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-nonsense")
    with pytest.raises((ModelError, NodeError), match="there is a GPU that cannot be used"):
        resolve_device(auto, "fp32")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert resolve_device(auto, "fp32").device.type == "cpu"


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch is built for CUDA")
def test_a_gpu_without_virtual_memory_names_the_setting(gpu_of_torch: pytest.MonkeyPatch) -> None:
    def no_virtual_memory(*_arguments: object, **_keywords: object) -> None:
        raise RuntimeError("CUDA driver error: operation not supported")  # by torch 2.13 on an NVIDIA vGPU

    gpu_of_torch.setattr(torch, "tensor", no_virtual_memory)
    gpu_of_torch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert "set PYTORCH_ALLOC_CONF=expandable_segments:False" in refusal()
    why_no_gpu.cache_clear()
    gpu_of_torch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    assert "expandable_segments" not in refusal()


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_computes_with_the_threads_that_were_asked_for(threads: int) -> None:
    device = resolve_device(DeviceConfig(kind="cpu", threads=threads), "fp32")
    assert device.threads == torch.get_num_threads() == threads


@pytest.mark.parametrize(("asked", "expected"), [(None, True), (True, True), (False, False)])
def test_a_cpu_is_deterministic_by_default(asked: bool | None, expected: bool) -> None:
    device = resolve_device(DeviceConfig(kind="cpu", threads=1, deterministic=asked), "fp32")
    assert device.deterministic is torch.are_deterministic_algorithms_enabled() is expected


def test_deterministic_mode_does_not_fill_new_memory() -> None:
    resolve_device(CPU, "fp32")
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_multiplies_in_the_resolved_precision(precision: ResolvedPrecision, dtype: torch.dtype) -> None:
    # Made by hand: torch emulates what this CPU may lack.
    device = Device(torch.device("cpu"), precision, threads=1, deterministic=True)
    with device.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(("precision", "scaled"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_the_loss_is_scaled_for_fp16_only(precision: ResolvedPrecision, scaled: bool) -> None:
    device = Device(torch.device("cpu"), precision, threads=1, deterministic=True)
    assert (device.scaler().scale(torch.tensor(3.0)).item() != 3) is scaled


def test_the_state_of_a_scaler_is_restored_in_its_own_precision_only(caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_cap_above_the_memory_of_the_gpu_is_refused() -> None:
    with pytest.raises(ModelError, match=r"gpu_memory_gib is 20, but this GPU has 16\.0 GiB"):
        cap_memory(20 << 30, 16 << 30)


def test_on_a_cpu_a_cap_is_only_recorded() -> None:
    config = DeviceConfig(kind="cpu", threads=1, gpu_memory_gib=2.5)
    assert resolve_device(config, "fp32").describe()["gpu_memory_cap_gib"] == 2.5
    assert resolve_device(config, "fp32").free_bytes() is None
