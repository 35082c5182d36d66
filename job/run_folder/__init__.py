"""The files of a run folder: receipts, attempts, conditions, progress, the lease; and their copy in a mirror."""
