import os
from pathlib import Path

from job.run_folder.receipts import read_receipt, write_receipt


def finished(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.bin").write_bytes(b"abc")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-1.ckpt").write_bytes(b"state")
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / ".lock").write_text("")
    write_receipt(folder, "gan", "key", {}, {"seconds": 1}, {})


def test_outputs_are_all_files_but_checkpoints_metrics_and_locks(tmp_path: Path) -> None:
    finished(tmp_path)
    receipt = read_receipt(tmp_path, "key", verify=True)
    assert receipt is not None
    # SHA-256 of "abc", FIPS 180-2 appendix B.1.
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert {name: record.sha256 for name, record in receipt.outputs.items()} == {"sub/a.bin": sha256}


def test_a_receipt_with_another_key_does_not_count(tmp_path: Path) -> None:
    finished(tmp_path)
    assert read_receipt(tmp_path, "other key", verify=False) is None


def test_a_phase_without_a_readable_receipt_is_unfinished(tmp_path: Path) -> None:
    assert read_receipt(tmp_path / "absent", "key", verify=False) is None
    (tmp_path / "receipt.json").write_text('{"key": "key"')
    assert read_receipt(tmp_path, "key", verify=False) is None


def test_a_changed_size_or_a_missing_file_is_detected(tmp_path: Path) -> None:
    finished(tmp_path)
    (tmp_path / "sub" / "a.bin").write_bytes(b"abcd")
    assert read_receipt(tmp_path, "key", verify=False) is None
    (tmp_path / "sub" / "a.bin").unlink()
    assert read_receipt(tmp_path, "key", verify=False) is None


def test_a_copy_is_recognised_by_its_digest(tmp_path: Path) -> None:
    finished(tmp_path)
    os.utime(tmp_path / "sub" / "a.bin", (1, 1))
    assert read_receipt(tmp_path, "key", verify=False) is not None
    (tmp_path / "sub" / "a.bin").write_bytes(b"abd")
    assert read_receipt(tmp_path, "key", verify=False) is None


def test_verify_does_not_trust_size_and_time(tmp_path: Path) -> None:
    finished(tmp_path)
    path = tmp_path / "sub" / "a.bin"
    time = path.stat().st_mtime_ns
    path.write_bytes(b"abd")
    os.utime(path, ns=(time, time))
    assert read_receipt(tmp_path, "key", verify=False) is not None
    assert read_receipt(tmp_path, "key", verify=True) is None
