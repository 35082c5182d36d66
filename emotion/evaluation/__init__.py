"""Metrics, baselines and plots."""
