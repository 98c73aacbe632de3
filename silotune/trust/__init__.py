"""What people and machines sign, chain and seal: identities, rosters, audit logs, files at rest."""
