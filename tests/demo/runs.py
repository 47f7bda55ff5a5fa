"""The runs of launch/demo.sh, trained for a few steps: the commands are the script's own."""

import shlex
from pathlib import Path

from iccld.cli import main
from tests.factory import scene_overrides

SCRIPT = (Path(__file__).parents[2] / "launch/demo.sh").read_text()
FEW_STEPS = ["stage1.trainer.num_steps=4", "stage2.trainer.num_steps=2"]
SMALL = ["metrics.pictures.every=2", "evaluation.max_images=2", "evaluation.diagnostic_images=0"]
SMALL += ["stage1.objective.corruption_start=2", *(f"stage{i}.trainer.global_batch_size=4" for i in (1, 2))]


def commands(folder: Path) -> list[list[str]]:
    """Return the script's commands behind `run`, as words, with the demo in `folder`."""
    lines = SCRIPT.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.replace("$demo", str(folder)))[1:] for line in lines if line.startswith("run ")]
    return [command for command in words if "$@" not in command]


def train_runs(folder: Path, shards: Path) -> None:
    """Train the demo's runs in one process, on the shards of `make_scene_shards`."""
    of_shards = [word for word in scene_overrides(shards, folder) if "." in word.partition("=")[0]]
    for command in commands(folder):
        if command[:4] == ["iccld", "launch", "$ranks", "train"]:
            own = [word for word in command[4:] if "num_steps=3" not in word]
            assert main(["train", *own, *of_shards, "statistics_samples=4", *SMALL, *FEW_STEPS]) == 0
