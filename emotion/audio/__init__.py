"""Sound files to log-mels, the feature store, and back to sound."""
