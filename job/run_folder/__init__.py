"""What a run keeps in its folder: receipts, attempts, conditions, the lease; and the mirror of it."""
