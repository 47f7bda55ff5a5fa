import pytest

from tests.data.factory import make_set


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shards of 13 labelled source pairs and 11 target images."""
    root = tmp_path_factory.mktemp("sets")
    return {
        "source": str(make_set(root / "source", 13).folder),
        "target": str(make_set(root / "target", 11, labels=False).folder),
    }
