"""The phases of a job, and the runner that brings a run forward."""
