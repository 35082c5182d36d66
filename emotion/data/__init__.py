"""The dataset: its reader, label scale, faults, splits, the guard against leaks, and a small generated one."""
