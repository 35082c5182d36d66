"""Access to files in folders and in S3 through one protocol, and the phase stage, which fetches the dataset."""
