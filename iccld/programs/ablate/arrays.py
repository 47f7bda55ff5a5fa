"""Grid on a cluster: an array of jobs for each row, each element a run, as `iccld submit` makes them.

An element waits for the element of the row that it needs, with the same seed. Jobs that wait are not known to a later
command, so it is for what failed, once the jobs are over.
"""

from pathlib import Path

from iccld.programs.ablate.rows import Ablation, prepare
from iccld.programs.ablate.running import states_of
from iccld.programs.ablate.tasks import Array, Task, arrays_of, tasks_of
from iccld.programs.arguments import parse_verb
from iccld.programs.submit import submit
from iccld.schema import key_of


def submit_rows(ablation: Ablation, *, settings: Path, dry_run: bool = False) -> int:
    """Submit what is left, or show the scripts. Raises ValueError if the user erred."""
    arrays = arrays_of(tasks_of(ablation.grid), states_of(ablation))
    if not arrays:
        print("nothing is left to train; --report-only reports it", flush=True)
        return 0
    words = {array: submission(ablation, array, settings=settings) for array in arrays}
    jobs: dict[Array, str] = {}
    for array in arrays:
        after = [f"--after={jobs[array.after]}"] if array.after else []
        if not dry_run:
            for task in array.tasks:
                prepare(ablation, task)
        jobs[array] = submit.submit_jobs(
            parse_verb("submit", submit, [*after, *(["--dry-run"] if dry_run else []), *words[array]])
        )
    if not dry_run:
        print(f"when the jobs are over: {ablation.command} --report-only", flush=True)
    return 0


def submission(ablation: Ablation, array: Array, *, settings: Path) -> list[str]:
    """Return the words of `iccld submit` for one array."""
    words = [f"--settings={settings}", f"--job-name={array.name}"]
    for task in array.tasks:
        words += ["--variant", f"seed_{task.seed}", *_own(ablation, task)]
    return [*words, "--", "train", *ablation.grid.rows[array.name].settings, f"run_dir={ablation.folder / array.name}"]


def _own(ablation: Ablation, task: Task) -> list[str]:
    """Return the settings that the runs of a row do not share."""
    shared = ablation.grid.rows[task.name].settings
    return [word for word in ablation.words(task)[1:] if word not in shared and key_of(word) != "run_dir"]
