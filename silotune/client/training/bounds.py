"""What a trainer may touch, by what it is for: the base model, the records of one dataset, a device.

Records in a database are read by the trainer itself: it may then connect to that one port.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from silotune.client.data_parallel import processes_for
from silotune.client.training.database import address_of, certificates_of
from silotune.client.training.launcher import python_path
from silotune.data.site import DatasetConfig, SiteConfig, expand_url, sqlite_file

_SOME_THREADS = 64
_KEPT = (
    "PATH", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM",
)  # fmt: skip
_KEPT_KINDS = ("LC_", "OMP_", "MKL_", "CUDA_", "NVIDIA_", "PYTORCH_")


def table_of(site: SiteConfig, *, scratch: Path, models: Iterable[str] = ()) -> dict[str, Any]:
    """What trainers of a site may open, reach and use: the `Launcher`'s table, as JSON values.

    Parameters
    ----------
    site : SiteConfig
        Its datasets, its resources and the base models of its policy.
    scratch : Path
        Folder in which each trainer gets one of its own to write in.
    models : iterable of str
        More base models, by their place here.

    Raises
    ------
    SiteConfigInvalid
        The URL of a database names an environment variable that is not set.
    """
    resources = site.resources
    places = {*models, *(site.policy.base_models.values() if site.policy else ())}
    return {
        "datasets": {name: _records(site, dataset) for name, dataset in site.datasets.items()},
        "models": {place: [str(path) for path in _model_paths(place)] for place in places},
        "resources": {
            "processes": (resources.threads or os.cpu_count() or 1) * 8 + _SOME_THREADS,
            "memory": None if resources.memory_mb is None else resources.memory_mb * 1_000_000,
            "gpu": resources.device != "cpu",
            "devices": processes_for(resources),
        },
        "scratch": str(scratch),
        "environment": _environment(),
    }


def _environment() -> dict[str, str]:
    """The environment of a trainer: of the daemon's what computing needs, and no secret."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or name.startswith(_KEPT_KINDS)
    }
    return kept | {
        "PYTHONPATH": python_path(),
        "HF_HUB_CACHE": str(_hub_cache()),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def record_paths(site: SiteConfig, dataset: DatasetConfig) -> list[Path]:
    """Where the records of a dataset lie, and their images; no table that is reached by TCP."""
    images = [] if dataset.images is None else [site.images_of(dataset).resolve()]
    return [*_table_paths(site, dataset), *images]


def _table_paths(site: SiteConfig, dataset: DatasetConfig) -> list[Path]:
    if dataset.path is not None:
        return [(site.folder / dataset.path).resolve()]
    file = sqlite_file(_url(dataset), site.folder)
    if file is None:
        return []
    file = file.resolve()
    return [file, *(file.with_name(file.name + end) for end in ("-wal", "-shm", "-journal"))]


def all_record_paths(site: SiteConfig) -> dict[str, list[Path]]:
    """Where the records of each dataset lie: what a daemon shuts itself out from."""
    return {name: record_paths(site, dataset) for name, dataset in site.datasets.items()}


def _records(site: SiteConfig, dataset: DatasetConfig) -> dict[str, Any]:
    return {
        "read": [str(path) for path in (*record_paths(site, dataset), *_beside(site, dataset))],
        "reach": address_of(_url(dataset)),
        "url": _url(dataset),
    }


def _beside(site: SiteConfig, dataset: DatasetConfig) -> list[Path]:
    """What is read besides records: synonyms, certificates of a database."""
    augmentation = dataset.augmentation
    words = [site.folder / augmentation.synonyms] if augmentation and augmentation.synonyms else []
    return [*(path.resolve() for path in words), *certificates_of(_url(dataset))]


def _url(dataset: DatasetConfig) -> str:
    return "" if dataset.url is None else expand_url(dataset.url)


def _hub_cache() -> Path:
    """Where Hugging Face's libraries keep models, as they find it."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser().absolute()


def _model_paths(base: str) -> Iterator[Path]:
    if not base:
        return
    folder = Path(base).expanduser()
    if not folder.is_dir():
        yield _hub_cache() / f"models--{base.replace('/', '--')}"
        return
    yield folder.resolve()
    for path in folder.iterdir():
        if path.is_symlink():
            yield path.resolve()
