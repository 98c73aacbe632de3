"""What confines a process that reads records: what it may open, whom it may reach, what it may ask."""
