"""The coordinator's Flower ServerApp: the same in simulation and in deployment."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from silotune.events import tracing
from silotune.plan import Plan
from silotune.server.rounds import Observer, RoundLoop, RunStore


def build_server_app(
    *, plan: Plan, run: str, store: RunStore, observer: Observer | None = None
) -> ServerApp:
    """A ServerApp that executes `plan` once and leaves everything in `store`.

    Parameters
    ----------
    plan : Plan
        What to train.
    run : str
        The run's name.
    store : RunStore
        History and checkpoints; with a checkpoint in it the run is resumed.
    observer : Observer, optional
        Told of each finished round.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context  # its run config repeats what is given here
        with tracing.span("run", run=run, begins=True):
            RoundLoop(plan=plan, run=run, grid=grid, store=store, observer=observer).execute()

    return app
