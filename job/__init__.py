"""The job that runs inside the container: it turns a spec into a published model."""
