"""What happens: the event schema, runs folded from events, and where events are read from."""
