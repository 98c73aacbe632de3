"""A trained model over HTTP: requests are gathered into batches, and nothing of their texts is kept."""
