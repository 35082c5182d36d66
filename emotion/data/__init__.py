"""The dataset as it is found: annotations, splits, leaks, faults, and a small one made on the spot."""
