"""All that touches the inside of Flower, and nothing else does."""
