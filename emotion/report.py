from pathlib import Path
def write_report(run: Path, name: str) -> None:
    (run/"report.html").write_text(name)
