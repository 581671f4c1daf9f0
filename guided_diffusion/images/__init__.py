"""Finding, reading, labelling and choosing images."""
