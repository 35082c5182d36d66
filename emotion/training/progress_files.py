"""Names of the files in which a phase reports while it runs, beside its outputs. No imports: a login node reads them, too."""

METRICS = "metrics.jsonl"  # numbers and warnings, one JSON object a line: emotion/training/progress.py
PROGRESS = "progress.json"  # how far it is: job/run_folder/progress.py
