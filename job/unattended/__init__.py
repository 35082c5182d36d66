"""What a job needs that nobody looks at: a watchdog, a budget, notifications, trackers. None of them may harm it."""
