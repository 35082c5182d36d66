"""The vision transformer that reads valence and arousal from log-mels."""
