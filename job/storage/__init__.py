"""Files in folders and in S3 behind one protocol, and the phase stage, which fetches the dataset."""
