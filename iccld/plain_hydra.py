"""Hydra within limits: files of the user's own are plain data, and nothing of the environment is read."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

from iccld.group_files import read_group_file


class OwnGroups(FileConfigSource):
    """Folder of groups whose every file, also one that another's `defaults` name, is read within our limits."""

    settings: ClassVar[type]

    @classmethod
    def introduce(cls, settings: type) -> None:
        """Make the folder known to Hydra. `settings`: the schema that files are compared with."""
        cls.settings = settings
        Plugins.instance().register(cls)

    @staticmethod
    def scheme() -> str:
        return "own"

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        values, text = read_group_file(path, self.settings)
        header = self._get_header_dict(text[:512])
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(dict(values)), header)


@contextlib.contextmanager
def beside_other_hydras() -> Iterator[None]:
    """Set aside the Hydra that the calling program uses: a process has only one."""
    kept = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = kept  # asked for again: composing may have replaced it


@contextlib.contextmanager
def without_resolvers() -> Iterator[None]:
    """Take away OmegaConf's and others' functions, as `${oc.env:NAME}`: a file would read the user's environment.

    `${a.b}`, the value of another setting, is no such function.
    """
    kept, BaseContainer._resolvers = BaseContainer._resolvers, {}
    try:
        yield
    finally:
        BaseContainer._resolvers = kept
