"""What a site and the coordinator have in common: identities, messages, sealed files, audit logs."""
