"""Commands of the command line, one module each; thin: they parse, call and print."""
