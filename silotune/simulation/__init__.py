"""Many sites on one machine: grid, partitions, run directory, report and progress."""
