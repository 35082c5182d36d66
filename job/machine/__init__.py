"""Checks whether this machine can do the job: its device, disks, clock, libraries, and its access to storage."""
