"""The phases of a job, and the runner that executes them."""
