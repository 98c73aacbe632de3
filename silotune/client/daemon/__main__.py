"""A site's daemon as a process that has the command line no longer in its memory: `silotune site start`.

The command runs this in its own place: what it parsed and printed with would stay in memory for months.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Threads of NumPy's BLAS, which a daemon has no use for, would be left out when it shuts itself out,
# also where an operator's environment asks for more of them.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# The command line of httpx, which it loads if it can.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]

from silotune.flower.lean import lean_imports  # noqa: E402

with lean_imports():
    from silotune.client.daemon.daemon import Daemon

from silotune.client.isolation.kernel import hide_memory  # noqa: E402
from silotune.data.site import load_guarded  # noqa: E402
from silotune.errors import SilotuneError  # noqa: E402
from silotune.events import tracing  # noqa: E402
from silotune.logs import configure  # noqa: E402


def main(arguments: list[str]) -> int:
    """Run until SIGTERM; the exit code.

    Parameters
    ----------
    arguments : list of str
        Path of site.toml, format and level of the log, seconds of grace.
    """
    config, style, level, grace = arguments
    try:
        configure(style="json" if style == "json" else "text", level=level)
        site = load_guarded(Path(config))
        hide_memory()
        tracing.configure("silotune-site")
        try:
            Daemon(site, grace=float(grace)).run()
        finally:
            tracing.stop()
    except SilotuneError as error:
        told = (f"{error.code} {error.title}", error.detail, f"Why: {error.cause}")
        print(*told, f"Do:  {error.remedy}", sep="\n", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
