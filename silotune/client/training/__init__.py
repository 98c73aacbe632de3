"""What reads a site's records and trains on them: in this process, or in one of its own."""
