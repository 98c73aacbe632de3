"""What others on this machine must not be able to change: a site's configuration and its state."""

from __future__ import annotations

from pathlib import Path

from silotune.data.site import SiteConfig
from silotune.privacy.durable import require_private_tree, require_unwritable


def load_guarded(path: Path) -> SiteConfig:
    """Read the site.toml of a real site.

    Raises
    ------
    SiteConfigInvalid
        It is missing or wrong.
    FileExposed
        As `require_guarded`.
    """
    site = SiteConfig.load(path)
    require_guarded(site)
    return site


def require_guarded(site: SiteConfig) -> None:
    """Refuse a site whose configuration or state is not in its own hands.

    Raises
    ------
    FileExposed
        Others may write site.toml or its folder, enter the state folder, or have put a link there.
    """
    if site.file is not None:
        require_unwritable(site.file)
    if site.state_folder.is_symlink() or site.state_folder.exists():
        require_private_tree(site.state_folder)
