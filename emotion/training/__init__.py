"""What both trainings share: checkpoints, device, memory, schedules, seeds, progress."""
