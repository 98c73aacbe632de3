"""The coordinator: rounds and their durable state."""
