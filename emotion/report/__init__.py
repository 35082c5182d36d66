"""Pages for readers who do not know the job: one HTML file each, which opens without a network."""
