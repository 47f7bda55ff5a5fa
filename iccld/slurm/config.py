"""Settings of a job: what it asks of the cluster, and what it runs.

Every value is checked here, so that the script's text can be written.
"""

import re
from dataclasses import dataclass, field, fields
from enum import Enum

from iccld.ranges import at_least, check_ranges


class Launcher(Enum):
    """Ways to start the ranks: SLURM starts each of them, or one `accelerate launch` a node does."""

    srun = "srun"
    accelerate = "accelerate"


class Container(Enum):
    none = "none"
    apptainer = "apptainer"
    enroot = "enroot"


# What goes into a directive unquoted, by field. SLURM's own words for time, memory, features and lists.
_PATTERNS = {
    "job_name": (r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", "letters, digits and ._+-"),
    "account": (r"[A-Za-z0-9._+@-]*", "letters, digits and ._+@-"),
    "partition": (r"[A-Za-z0-9._,+-]*", "names with commas between"),
    "qos": (r"[A-Za-z0-9._+-]*", "letters, digits and ._+-"),
    "gpu_type": (r"[A-Za-z0-9._-]*", "letters, digits and ._-"),
    "memory": (r"(\d+[KMGT]?)?", "a number and K, M, G or T, as in 64G"),
    "time": (r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}", "minutes, hours:minutes:seconds or days-hours"),
    "constraint": (r"[A-Za-z0-9._&|,*()\[\]+-]*", "SLURM's expression of features, without spaces"),
}
_NODES = re.compile(r"[A-Za-z0-9._,\[\]-]+")
_MOUNT = re.compile(r"[^,:\s]+(:[^,:\s]+){0,2}")
_MODULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+/-]*")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_DIRECTIVE = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9._:,+@/%=*&|()!\[\] -]+)?")


@dataclass(frozen=True)
class SubmitConfig:
    """Settings of the allocation and of how ranks are started in it. Empty strings leave a choice to the cluster."""

    job_name: str = "iccld"  # the name in the queue
    account: str = ""  # SLURM's account
    partition: str = ""  # SLURM's partition, or several with commas
    qos: str = ""  # SLURM's quality of service
    nodes: int = 1  # nodes of a job
    gpus_per_node: int = 0  # 0: none are asked for
    gpu_type: str = ""  # of the GPUs, as in h100
    ranks_per_node: int = 0  # 0: one for each GPU, or one
    cpus_per_task: int = 8  # cores of a rank
    memory: str = ""  # memory of a node, as in 64G
    time: str = "24:00:00"  # the limit: minutes, hours:minutes:seconds or days-hours
    constraint: str = ""  # SLURM's expression of node features
    exclude: tuple[str, ...] = ()  # nodes that are left out
    after: tuple[str, ...] = ()  # jobs that must end well before this one starts
    max_running: int = 0  # elements of an array that run at once; 0: all
    requeue: bool = True  # start the job again after it was stopped or lost
    max_stalled: int = 3  # attempts in a row without a newer checkpoint, after which the job is not started again
    lead_s: int = 300  # seconds before the time limit at which the ranks are told to save
    launcher: Launcher = Launcher.srun  # SLURM starts each rank (`srun`), or one `accelerate launch` a node
    container: Container = Container.none  # the container that the ranks run in
    image: str = ""  # the container's image
    mounts: tuple[str, ...] = ()  # FROM:TO, for the container
    modules: tuple[str, ...] = ()  # environment modules to load
    setup: tuple[str, ...] = ()  # shell lines before the start
    directives: tuple[str, ...] = ()  # further options of sbatch, as `--reservation=maintenance`
    python: str = "python"  # the interpreter of the ranks

    def __post_init__(self) -> None:
        for name, (pattern, rule) in _PATTERNS.items():
            _check(name, getattr(self, name), re.compile(pattern), rule)
        for name, pattern, rule in (
            ("exclude", _NODES, "names of nodes, as in n1,gpu[02-05]"),
            ("after", re.compile(r"[A-Za-z0-9_]+"), "numbers of jobs"),
            ("mounts", _MOUNT, "FROM:TO, without spaces and commas"),
            ("modules", _MODULE, "names of modules"),
            ("directives", _DIRECTIVE, "--option or --option=value"),
        ):
            for value in getattr(self, name):
                _check(name, value, pattern, rule)
        for name in ("image", "python", *(["setup"] if self.setup else [])):
            values = self.setup if name == "setup" else (getattr(self, name),)
            for value in values:
                check_line(name, value)
        self._check_numbers()
        if (self.container is Container.none) != (not self.image):
            raise ValueError(f"container={self.container.value} and image={self.image!r} need each other; give both.")
        if self.container is not Container.none and self.launcher is not Launcher.srun:
            raise ValueError("launcher=accelerate does not start containers; use launcher=srun.")

    def _check_numbers(self) -> None:
        from_one = ("nodes", "cpus_per_task", "max_stalled", "lead_s")
        check_ranges(self, "", **dict.fromkeys(from_one, at_least(1)))
        check_ranges(self, "", **dict.fromkeys(("gpus_per_node", "ranks_per_node", "max_running"), at_least(0)))
        if self.lead_s > 65535:
            raise ValueError(f"lead_s={self.lead_s} must be at most 65535 s, SLURM's own limit for --signal.")
        if self.requeue and 2 * self.lead_s > (seconds := seconds_of(self.time)):
            raise ValueError(
                f"time={self.time} ({seconds} s) must be at least twice lead_s={self.lead_s}, or little is trained "
                f"between start and save; ask for more time."
            )

    @property
    def tasks_per_node(self) -> int:
        """Number of ranks a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Variant:
    """Element of an array: a run of its own."""

    run_dir: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """Work of a job: `iccld` with `arguments`, or with those of the array's element.

    `code`: the folder with the package. `folder`: where the job starts. `variables`: the engine's; `engine_file`: its
    YAML, for accelerate's launcher.
    """

    run_dir: str
    code: str
    folder: str
    arguments: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    engine_file: str = ""

    def __post_init__(self) -> None:
        for name in ("run_dir", "code", "folder", "engine_file"):
            check_line(name, getattr(self, name))
        if ":" in self.run_dir + self.code:
            raise ValueError(f"run_dir={self.run_dir!r} must be without colons, at which PYTHONPATH is divided.")
        if "\\" in self.run_dir + self.folder:
            raise ValueError(f"run_dir={self.run_dir!r}: SLURM takes no backslash in the path of a log; use another.")
        for argument in (*self.arguments, *(a for variant in self.variants for a in variant.arguments)):
            check_line("argument", argument)
        for name, value in self.variables.items():
            _check("a variable's name", name, _VARIABLE, "capital letters, digits and _")
            check_line(name, value)
        if not re.fullmatch(r"/.*", self.run_dir) or not re.fullmatch(r"/.*", self.code):
            raise ValueError(f"run_dir={self.run_dir} and code={self.code} must be absolute paths.")


def check_line(name: str, value: str) -> None:
    """Refuse a text that no quoting makes one line. Raises ValueError."""
    if not value.isprintable():
        raise ValueError(f"{name}={value!r} holds a line break or another control character; use a plain name.")


def _check(name: str, value: str, pattern: re.Pattern[str], rule: str) -> None:
    if not pattern.fullmatch(value):
        raise ValueError(f"{name}={value!r} must be {rule}; a job script takes nothing else there.")


def seconds_of(time: str) -> int:
    """Return the seconds of SLURM's time: `90` minutes, `1:30` minutes:seconds, `2:00:00`, `1-12`, `1-12:00:00`."""
    days, _, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if days:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(numbers) == 3:
        return numbers[0] * 3600 + numbers[1] * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) > 1 else 0)


SETTINGS = tuple(setting.name for setting in fields(SubmitConfig))
