"""Folders and S3 behind one protocol, and staging of the dataset. The only importer of boto3."""
