"""The science: arrays and files in, arrays and files out. Knows no clusters, no signals and no storage."""
