"""Errors of events, of where they are read from, and of where they are sent."""

from __future__ import annotations

from silotune.errors import EnvironmentFault, RunError


class EventMalformed(RunError):
    """An event lacks a field of its kind or has one of another type."""

    code = "ST-630"
    title = "An event is not of its schema"
    cause = (
        "A field is missing or of another type; the file was edited, or the writer has a defect."
    )
    advice = "Compare the fields named with docs/events.md; restore the file if it was edited."


class RunNotFound(RunError):
    """There is no run of that name where one was looked for."""

    code = "ST-631"
    title = "There is no such run here"
    cause = "The name is wrong, or the run is in another folder or federation."
    advice = "Choose one from the list of runs."


class FileNotOffered(RunError):
    """The run has no such file to download."""

    code = "ST-632"
    title = "The run does not offer this file"
    cause = "The file is not there yet, or is not one that may be downloaded."
    advice = "Choose one from the run's page; adapters come with the first finished round."


class ExtraMissing(EnvironmentFault):
    """An optional package that the user asked for is not installed."""

    code = "ST-701"
    title = "An optional part of silotune is not installed"
    cause = (
        "Some connections to other tools need packages that silotune does not install by itself."
    )
    advice = "Install the extra that the message names into the environment that silotune runs in."
