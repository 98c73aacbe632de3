"""What `import silotune` gives: the command line's own work, from Python."""
