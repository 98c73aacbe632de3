"""A site's daemon: its connection, its books, its owner's word, its own page."""
