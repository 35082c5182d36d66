"""The vision transformer that predicts valence and arousal from log-mels."""
