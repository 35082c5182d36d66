"""The spec: its model, strict YAML, locations, errors with line and column. No torch."""
