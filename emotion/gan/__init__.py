"""The conditional GAN that makes labelled log-mels."""
