"""A site's records: its configuration, reading and checking them, the held-out split, demo data."""
