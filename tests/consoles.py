"""A console like the product's own (`silotune.terminal`), that writes to memory."""

import io

from rich.console import Console


def console(*, width=80, **settings):
    return Console(
        file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False, **settings
    )
