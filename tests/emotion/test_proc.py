from pathlib import Path

from emotion.proc import cpu_model, memory_bytes, read_field


def test_the_processors_name_is_read_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text("processor\t: 0\nmodel name\t: AMD EPYC 7B13: 64 cores\nflags\t: avx2\n")
    (tmp_path / "arm").write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert cpu_model(tmp_path / "x86") == "AMD EPYC 7B13: 64 cores"
    assert cpu_model(tmp_path / "arm") is None


def test_memory_is_given_in_bytes_and_none_where_there_is_no_proc(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert (memory_bytes("VmRSS", status), memory_bytes("VmHWM", status)) == (1 << 20, 2 << 20)
    status.unlink()
    assert memory_bytes("VmRSS", status) is None
    assert read_field(status, "Name") is None
