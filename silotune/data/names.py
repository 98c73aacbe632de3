"""Names of people, places and organisations in running text, by Presidio and a model of the site's own.

The model is a folder on this machine: a name of a model would have Presidio download it. Of Presidio
only the recogniser of spaCy's entities is used; its default set of recognisers asks the network for a
list of domains as soon as a text has an e-mail address, and forms and check digits are looked for
elsewhere (`silotune.data.identifiers`). Counts come out, never a text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.data.identifiers import Sighting
from silotune.errors import EnvironmentFault, ModelNotFound

INSTALL = "pip install 'silotune[names]'"

_KINDS = {"PERSON": "names of people", "LOCATION": "places", "ORGANIZATION": "organisations"}
_LONGEST = 900_000  # characters; spaCy refuses a million


def find_names(
    texts: Sequence[str],
    unit_of: NDArray[np.int64],
    *,
    model: Path,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Sighting, ...]:
    """Count the texts in which a model sees names.

    Parameters
    ----------
    texts : sequence of str, length n
        One a record.
    unit_of : int64 array of shape [n]
        The unit of each.
    model : Path
        The folder of a spaCy model.
    advance : callable
        Called after each text.

    Raises
    ------
    ModelNotFound
        The folder holds no spaCy model.
    EnvironmentFault
        Presidio is not installed.
    """
    language, analyze = _analyzer(model)
    found = {kind: np.zeros(len(texts), dtype=bool) for kind in _KINDS}
    seen = dict.fromkeys(_KINDS, 0)
    for row, text in enumerate(texts):
        for entity in analyze(text[:_LONGEST], language=language, entities=list(_KINDS)):
            found[entity.entity_type][row] = True
            seen[entity.entity_type] += 1
        advance()
    return tuple(
        Sighting(
            kind.lower(),
            title,
            records=int(np.count_nonzero(found[kind])),
            units=len(np.unique(unit_of[found[kind]])),
            seen=seen[kind],
            passed=seen[kind],
            checked=False,
            by_chance=None,
        )
        for kind, title in _KINDS.items()
    )


def _analyzer(model: Path) -> tuple[str, Callable[..., Any]]:
    """The model's language, and what finds entities with it."""
    try:
        language = str(json.loads((model / "meta.json").read_text("utf-8"))["lang"])
    except (OSError, ValueError, KeyError):
        raise ModelNotFound(
            f"{model} is no folder of a spaCy model: it has no readable meta.json",
            remedy="Name the folder that holds meta.json and config.cfg. Nothing is downloaded here.",
        ) from None
    try:
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
        from presidio_analyzer.predefined_recognizers import SpacyRecognizer
    except ImportError:
        raise EnvironmentFault("--names needs Presidio", remedy=INSTALL) from None
    logging.getLogger("presidio-analyzer").setLevel(logging.CRITICAL)  # it logs texts when asked to
    kinds = list(_KINDS)
    recogniser = SpacyRecognizer(supported_language=language, supported_entities=kinds)
    place = {"lang_code": language, "model_name": str(model.resolve())}
    try:
        engine = SpacyNlpEngine(models=[place])
        engine.load()
    except Exception as exc:
        raise ModelNotFound(f"spaCy can't load {model}: {type(exc).__name__}") from None
    registry = RecognizerRegistry(recognizers=[recogniser], supported_languages=[language])
    analyzer = AnalyzerEngine(
        registry=registry,
        nlp_engine=engine,
        supported_languages=[language],
        log_decision_process=False,
    )
    return language, analyzer.analyze
