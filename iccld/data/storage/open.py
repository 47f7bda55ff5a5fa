"""Opening of the storage at a folder or URL; what reads URLs is imported only for them."""

import re
from pathlib import Path

from iccld.data.storage.base import LocalStorage, Storage, StorageConfig, is_remote, local_folder
from iccld.redact import without_secrets

SCHEMES = ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""Schemes that need no permission: each asks one server for bytes, and does nothing else."""


def open_storage(location: str | Path, config: StorageConfig | None = None) -> Storage:
    """Open the storage at a folder or URL. Nothing is read yet.

    Raises ValueError if the URL's scheme is not allowed or the package that reads it is missing.
    """
    config = config or StorageConfig()
    _check_scheme(str(location), config.allow_schemes)
    if not is_remote(location):
        return LocalStorage(str(local_folder(location)))
    from iccld.data.storage.remote import open_remote

    return open_remote(str(location), config)


def _check_scheme(location: str, allowed: list[str]) -> None:
    public, scheme = without_secrets(location), location.partition("://")[0].lower()
    if re.search(r"^[A-Za-z][\w+.-]*::.*://|::[A-Za-z][\w+.-]*://", location):
        raise ValueError(f"{public} chains several file systems, which is not supported; give the URL of the server.")
    if is_remote(location) and scheme not in (*SCHEMES, *allowed):
        raise ValueError(
            f"{public}: {scheme}:// is not among {', '.join(SCHEMES)}; where you know what it does, allow it on the "
            f"command line: data.storage.allow_schemes=[{scheme}]."
        )
