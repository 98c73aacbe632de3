"""The plan: what is to be trained, as data that everybody signs."""
