"""What a small install lacks is said in one line, with the extra that brings it."""

import re
import tomllib
from pathlib import Path

import pytest

from iccld.extras import EXTRA_OF, remedy

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"hydra-core": "hydra", "zlib-ng": "zlib_ng"}
REPLACED = {"zlib_ng", "simplejpeg"}  # by zlib and PIL


def packages(extra: str) -> set[str]:
    names = {re.split(r"[\[><=~;]", line)[0] for line in PROJECT["optional-dependencies"][extra]} - {"iccld"}
    return {IMPORTED_AS.get(name, name) for name in names}


def test_every_package_of_an_extra_for_use_is_named_with_it():
    extras = set(PROJECT["optional-dependencies"]) - {"dev", "docs"}
    brought = {name: extra for extra in extras for name in packages(extra) if name not in REPLACED}
    assert brought == EXTRA_OF


def test_using_a_model_takes_nothing_of_training():
    plain = {re.split(r"[\[><=~;]", line)[0] for line in PROJECT["dependencies"]}
    assert plain == {
        "torch", "numpy", "transformers", "huggingface_hub", "safetensors", "pillow", "pyyaml", "rich"
    }  # fmt: skip


def test_what_is_missing_is_said_with_its_remedy():
    assert remedy(ModuleNotFoundError(name="hydra.core")) == "needs hydra; pip install 'iccld[train]'"
    assert remedy(ModuleNotFoundError(name="s3fs")) == "needs s3fs; pip install 'iccld[s3]'"
    for error in (ModuleNotFoundError(name="iccld.nothing"), ImportError(name="hydra"), ImportError()):
        with pytest.raises(ImportError):
            remedy(error)
