"""Sound files → log-mels, the feature store, clips for the networks, and back to sound."""
