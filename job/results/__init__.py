"""Publishing of a run: manifest, provenance, copying; and tables over many published runs."""
