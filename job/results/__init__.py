"""What a run publishes: manifest, provenance, publishing; and tables over many published runs."""
