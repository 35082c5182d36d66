"""Compares the cost model's estimates (job/pipeline/costs.py) with the times of finished runs. Runs no job.

python -m tests.bench.estimates WORK…
"""

import sys
from pathlib import Path

from emotion.files import read_json
from job.pipeline.costs import Songs, seconds_of
from job.pipeline.estimate import songs_at
from job.pipeline.phases import PHASES
from job.run_folder.receipts import RECEIPT
from job.spec.load import load_spec


def main() -> None:
    names = [phase.name for phase in PHASES]
    print("| run | training songs | " + " | ".join(names) + " | all |\n" + "|---" * (len(names) + 3) + "|")
    for split in sorted(path for work in sys.argv[1:] for path in Path(work).glob("*/split-*/split.csv")):
        run, rows = split.parents[1], split.read_text(encoding="utf-8").splitlines()[1:]
        spec = load_spec(run / "spec.yaml")
        receipts = {}
        for path in [*run.glob(f"*/{RECEIPT}"), *run.parent.glob(f"scratch/*/{RECEIPT}")]:
            receipt = read_json(path)
            receipts[receipt["phase"]] = receipt["measured"]["seconds"]
        here = songs_at(spec)
        songs = Songs(len(rows), here.seconds if here else 0.0, here.size if here else 0)
        expected = {name: seconds_of(name, spec, songs) or 0.0 for name in names}
        cells = [f"{expected[name]:.1f} / {receipts[name]:.1f}" if name in receipts else "" for name in names]
        total = f"{sum(expected.values()):.0f} / {sum(receipts.values()):.0f}"
        print(f"| {run.name} | {sum(row.endswith('train') for row in rows)} | " + " | ".join([*cells, total]) + " |")


if __name__ == "__main__":
    main()
