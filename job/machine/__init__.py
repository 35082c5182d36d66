"""Whether this machine can do the job: its device, disks, clock, libraries, and its ways to storage."""
