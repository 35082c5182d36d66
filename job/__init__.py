"""What happens inside the container, in order: spec in, published model out."""
