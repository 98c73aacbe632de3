"""A finished run for people: figures, charts, tables, sentences, one HTML file."""
