"""A site: training, the gate, and the daemon's parts."""
