import os
from pathlib import Path

from emotion.proc import cpu_model, file_system_type, memory_bytes, read_field


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


def test_a_mount_is_found_by_whatever_name_it_has(tmp_path: Path) -> None:
    """proc(5): blanks, tabs, line ends and backslashes are escaped in octal, other bytes are as they are."""
    line = b"36 35 98:0 / %b rw,noatime - %b /dev/sdb rw\n"
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(line % (b"/", b"ext4") + line % (rb"/a\040b\011c\134d\012e", b"nfs4") + line % (b"/caf\xe9", b"erofs"))
    assert file_system_type(Path("/a b\tc\\d\ne/songs"), mounts) == "nfs4"
    assert file_system_type(Path(os.fsdecode(b"/caf\xe9/songs")), mounts) == "erofs"
    assert file_system_type(Path("/a"), mounts) == "ext4"
    assert file_system_type(Path("/a"), tmp_path / "none") == ""
