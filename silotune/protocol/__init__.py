"""What travels between a site and the coordinator: bodies of HTTP routes, and signed envelopes."""
