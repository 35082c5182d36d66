"""Support for unattended jobs: watchdog, budget, notifications, trackers. Their failures must not fail the job."""
