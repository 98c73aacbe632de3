"""Doors for people of the coordinator's side: the admin socket, the gRPC admin API."""
