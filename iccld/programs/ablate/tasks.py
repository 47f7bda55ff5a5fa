"""Tasks that are left to run: a task is one row with one seed, and may wait for another one."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from iccld.programs.ablate.grid import Grid


@dataclass(frozen=True, order=True)
class Task:
    """One run: a row of the grid with one of its seeds."""

    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}/seed_{self.seed}"


class State(Enum):
    waiting = "waiting"
    running = "running"
    finished = "finished"
    failed = "failed"


Needs = Mapping[Task, Task | None]
"""Map each task to the one that it waits for, in the order in which tasks are begun."""


def tasks_of(grid: Grid) -> Needs:
    """Return all tasks, seed by seed, so that whole comparisons are there early; a needed task comes first."""
    order = list(_needed_first(grid))
    return {
        Task(name, seed): Task(grid.rows[name].needs, seed) if grid.rows[name].needs else None
        for seed in grid.seeds
        for name in order
    }


def _needed_first(grid: Grid) -> Iterator[str]:
    given: set[str] = set()

    def give(name: str) -> Iterator[str]:
        if name and name not in given:
            yield from give(grid.rows[name].needs)
            given.add(name)
            yield name

    for name in grid.rows:
        yield from give(name)


def next_task(needs: Needs, states: Mapping[Task, State], *, busy: Collection[Task] = ()) -> Task | None:
    """Return the first task that may begin now; None if there is none. `busy`: what another process trains."""
    for task, needed in needs.items():
        may_begin = needed is None or states[needed] is State.finished
        if states[task] is State.waiting and may_begin and task not in busy:
            return task
    return None


def blocked_tasks(needs: Needs, states: Mapping[Task, State]) -> list[Task]:
    """Return the waiting tasks that can never begin: the needed task has failed, or cannot begin either."""
    blocked: set[Task] = set()
    for task, needed in needs.items():
        hopeless = needed is not None and (states[needed] is State.failed or needed in blocked)
        if states[task] is State.waiting and hopeless:
            blocked.add(task)
    return [task for task in needs if task in blocked]


@dataclass(frozen=True)
class Array:
    """Tasks of one row that may be one job array. `after`: the array whose element of the same place each waits for."""

    name: str
    seeds: tuple[int, ...]
    after: "Array | None" = None

    @property
    def tasks(self) -> list[Task]:
        return [Task(self.name, seed) for seed in self.seeds]


def arrays_of(needs: Needs, states: Mapping[Task, State]) -> list[Array]:
    """Group what is not finished into arrays, each after the array that it waits for.

    An array that waits has the seeds of the other one, so that places agree; a run that is finished ends at once.
    """
    arrays: list[Array] = []
    for name in dict.fromkeys(task.name for task in needs):
        left = [task for task in needs if task.name == name and states[task] is not State.finished]
        needed = {needs[task] for task in left} - {None}
        waited_for = [array for array in arrays if needed & set(array.tasks)]
        arrays += [Array(name, array.seeds, array) for array in waited_for]
        covered = {seed for array in waited_for for seed in array.seeds}
        if seeds := tuple(task.seed for task in left if task.seed not in covered):
            arrays.append(Array(name, seeds))
    return arrays


def devices_of(slot: int, *, num_ranks: int, devices: Sequence[str]) -> list[str]:
    """Return the devices of the process in a slot; slots share devices only if there are too few."""
    if len(devices) <= 1:
        return list(devices)
    found = [devices[(slot * num_ranks + rank) % len(devices)] for rank in range(num_ranks)]
    return list(dict.fromkeys(found))
