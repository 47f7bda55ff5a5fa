"""job.sh after each end of an attempt, without a cluster: `scontrol` writes down what it was asked."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from iccld.slurm.history import failing_nodes
from tests.slurm.cluster import wait_until

JOB = Path(__file__).parents[2] / "iccld" / "slurm" / "job.sh"
SCONTROL = """\
#!/bin/bash
echo "$*" >>"$ASKED"
case "$1 $2" in
"show job") rm "$ASKED.silent" 2>/dev/null || echo "JobId=7 JobState=RUNNING Reason=None" ;;
"show hostnames") eval "printf '%s\\n' $(sed 's/\\[\\(.*\\)-\\(.*\\)\\]/{\\1..\\2}/' <<<"$3")" ;;
requeue*) [ -e "$ASKED.leave_out" ] || [ -n "$REFUSES" ] || kill -KILL "$PPID"; exit ${REFUSES:-0} ;; # as SLURM does
update*) kill -KILL "$PPID" ;;
esac
"""
STOPPED = 'mkdir -p "$(dirname "$ICCLD_OUTCOME")"; echo 85 >"$ICCLD_OUTCOME"'


@dataclass
class Job:
    """One job, attempt by attempt; `ranks` is what runs in place of srun."""

    folder: Path
    restarts: int = 0

    def attempt(self, ranks: str, *, setup: str = "", **variables: str) -> str:
        """The next attempt; what it adds to the log."""
        (script := self.folder / "script").write_text(
            f'{setup}\nsource "{JOB}"\nbegin_attempt "{self.run_dir}"\nlaunch bash -c \'{ranks}\'\nend_attempt\n'
        )
        before = len(self.log)
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                ["bash", str(script)], stdout=log, stderr=log, env=self._environment() | variables
            )
            self.restarts += 1
            if "in background" not in setup:
                self.process.wait(60)
        return self.log[before:]

    def _environment(self) -> dict[str, str]:
        (self.folder / "scontrol").write_text(SCONTROL)
        (self.folder / "scontrol").chmod(0o755)
        own = {"PATH": f"{self.folder}:{os.environ['PATH']}", "ASKED": str(self.folder / "asked"), "ICCLD_ASK_S": "0"}
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[01-02]", "SLURM_RESTART_COUNT": str(self.restarts)}
        return own | job

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    @property
    def requeued(self) -> list[str]:
        return [line for line in (self.folder / "asked").read_text().splitlines() if line.startswith("requeue")]

    @property
    def blamed(self) -> list[str]:
        path = self.run_dir / "slurm" / "failed_nodes"
        return [line.split("\t")[0] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_an_element_of_an_array_requeues_itself_alone(job: Job):
    """The last element's own number is the array's."""
    job.attempt(STOPPED, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert job.requeued == ["requeue 7_2"]


def test_a_controller_that_does_not_answer_is_asked_again(job: Job):
    (job.folder / "asked.silent").touch()
    job.attempt(STOPPED)
    assert job.requeued == ["requeue 7"] and (job.folder / "asked").read_text().count("show job 7") == 2


def test_a_requeue_that_fails_is_asked_for_again_and_then_given_up_in_a_line(job: Job):
    said = job.attempt(STOPPED, REFUSES="1")
    assert job.requeued == ["requeue 7"] * 5 and said.count("iccld: requeued\n") == 1
    assert said.endswith("could not be requeued; submit again, and it goes on\n")


def test_a_node_that_ended_two_attempts_is_left_out_of_the_next(job: Job):
    lost = 'echo "srun: error: Node failure on gpu02"; exit 1'
    job.attempt(lost)
    assert "update" not in (job.folder / "asked").read_text()
    (job.folder / "asked.leave_out").touch()
    job.attempt(lost)
    assert "update jobid=7 ExcNodeList=gpu02\n" in (job.folder / "asked").read_text()


def test_a_job_takes_nothing_over_from_one_of_the_same_number(job: Job):
    (state := job.run_dir / "slurm" / "job_7").mkdir(parents=True)
    (state / "outcome").write_text("0\n")
    assert "going on from: the beginning" in job.attempt(STOPPED)
    (state / "outcome").write_text("0\n")
    assert "finished before; nothing to do" in job.attempt(STOPPED), "of the job itself"


def test_a_setup_that_fails_ends_the_job_and_later_only_the_attempt(job: Job):
    setup = "source /nowhere || failed_setup='source /nowhere'"
    said = job.attempt("touch ran", setup=setup)
    assert "this line of the setup failed: source /nowhere" in said and job.process.returncode == 2
    assert "requeued" in job.attempt("touch ran", setup=setup), "a file server may be away"
    assert not (job.folder / "ran").exists() and not Path("ran").exists()


def test_a_slow_start_is_no_silence_and_silence_is_the_end(job: Job):
    ranks = 'sleep 4; for i in 1 2 3; do echo $i >"$ICCLD_ALIVE/a"; sleep 1; done; sleep 30'
    said = job.attempt(ranks, ICCLD_SILENCE_S="2", ICCLD_START_S="20")
    assert "no rank has given a sign of life for 2 s" in said and "status 137" in said
    assert (job.run_dir / "slurm" / "job_7" / "alive" / "0" / "a").read_text() == "3\n"
    assert "no rank has given a sign of life for 3 s" in job.attempt("sleep 30", ICCLD_SILENCE_S="2", ICCLD_START_S="3")


def test_the_ranks_know_how_long_late_ones_are_waited_for(job: Job):
    assert "waits 900 s" in job.attempt('echo "waits $ICCLD_GATHER_S s"')
    assert "waits 20 s" in job.attempt('echo "waits $ICCLD_GATHER_S s"', ICCLD_GATHER_S="20")


@pytest.mark.parametrize("name", ["ICCLD_START_S", "ICCLD_SILENCE_S", "ICCLD_GATHER_S"])
@pytest.mark.parametrize("value", ["2 min", "0", "1.5", "x[$(touch owned)]"])
def test_a_limit_is_whole_seconds(job: Job, name: str, value: str):
    assert f"iccld: {name}={value} must be whole seconds" in job.attempt(STOPPED, **{name: value})
    assert job.process.returncode == 2 and not (job.folder / "asked").exists()


@pytest.mark.parametrize(
    "setup", ["set -eufC -o pipefail; shopt -s nullglob failglob", "set -eE; trap 'exit 3' ERR", "IFS=$'\\n\\t'"]
)
def test_a_setup_that_sets_shell_options_changes_nothing(job: Job, setup: str):
    said = job.attempt("exit 9", setup=setup)
    assert "ended with status 9" in said and job.requeued == ["requeue 7"]
    assert "2 attempts without a newer checkpoint" in job.attempt("exit 9", setup=setup, max_stalled="2")


def test_the_status_is_the_ranks_own_also_where_a_signal_came(job: Job):
    job.attempt("sleep 3; exit 9", setup="# in background")
    wait_until(lambda: "going on from" in job.log, 20, "the start")
    job.process.terminate()
    job.process.wait(30)
    assert "the ranks save" in job.log and "ended with status 9" in job.log


def ends(*lines: str) -> str:
    return "; ".join(f'echo "{line}"' for line in lines) + "; exit 1"


@pytest.mark.parametrize(
    ("line", "nodes"),
    [
        ("srun: error: gpu01: task 0: Killed", ["gpu01"]),
        ("srun: error: gpu01: task 0: Bus error (core dumped)", ["gpu01"]),
        *(
            (f"srun: error: gpu01: task 0: {end}", [])
            for end in (
                "User defined signal 1", "Terminated", "Out Of Memory", "Segmentation fault (core dumped)", "Aborted",
                "Exited with exit code 1",
            )
        ),
        ("srun: error: gpu01: tasks 0-3: Killed", []),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0", []),
        ("slurmstepd: error: *** STEP 7.0 ON gpu01 CANCELLED AT 2026-01-01T00:00:00 ***", []),
        ("srun: error: Node failure on gpu[01-02]", ["gpu01", "gpu02"]),
        ("rank 0 quotes srun: error: Node failure on gpu01", []),
    ],
)  # fmt: skip
def test_only_what_a_node_may_have_caused_is_held_against_it(job: Job, line: str, nodes: list[str]):
    job.attempt(ends(line, "srun: error: gpu02: task 1: Killed") if not nodes else ends(line))
    quoted = "rank 0" in line
    assert job.blamed == (["gpu02"] if quoted else nodes)


@pytest.mark.parametrize(
    ("named", "nodes"),
    [
        ([("gpu02", "true"), ("gpu02", "true")], ["gpu02"]),
        ([("gpu01", "true"), ("gpu02", "true")], []),
        ([("gpu01", "false")], []),
    ],
)
def test_a_node_is_blamed_where_it_alone_was_named(job: Job, named: list[tuple[str, str]], nodes: list[str]):
    job.run_dir.mkdir()
    lines = [f'{{"event": "stopped", "host": "{host}", "sure": {sure}}}\n' for host, sure in named]
    (job.folder / "events").write_text("".join(lines))
    job.attempt(f'cat "{job.folder}/events" >>"{job.run_dir}/events.jsonl"; exit 1')
    assert job.blamed == nodes


def test_a_node_that_ended_two_attempts_of_which_one_was_cut_off_is_left_out(job: Job):
    """An attempt that was cut off is told by the next one, and is not the next one's failure."""
    job.attempt('echo "srun: error: Node failure on gpu01"; kill -KILL $PPID')
    job.attempt("exit 1")
    assert job.blamed == ["gpu01"] and failing_nodes(job.run_dir) == []
    job.attempt('echo "srun: error: Node failure on gpu01"; kill -KILL $PPID')
    job.attempt(ends("srun: error: Node failure on gpu01"))
    assert failing_nodes(job.run_dir) == ["gpu01"]
    attempts = [line.split("\t")[2] for line in (job.run_dir / "slurm" / "failed_nodes").read_text().splitlines()]
    assert attempts == ["job 7, restart 0", "job 7, restart 2", "job 7, restart 3"]


def test_nodes_of_an_attempt_that_was_cut_off_are_known_however_many_they_are(job: Job):
    """A list that is cut in the midst of a name asks for another node."""
    nodes = ",".join(f"gpu{number}" for number in range(9000))
    (job.folder / "sinfo").write_text('#!/bin/bash\necho "$4" >>"$ASKED"; echo "${4##*,}"\n')
    (job.folder / "sinfo").chmod(0o755)
    job.attempt("kill -KILL $PPID", SLURM_JOB_NODELIST=nodes)
    job.attempt("exit 1")
    assert job.blamed == ["gpu8999"] and nodes in (job.folder / "asked").read_text().splitlines()


def test_attempts_that_fail_and_attempts_that_are_cut_short_are_counted_apart(job: Job):
    for _ in range(4):
        assert "not started again" not in job.attempt(STOPPED)
    assert "not started again" not in job.attempt("exit 1")
    assert "not started again" not in job.attempt("echo srun: error: Node failure on gpu01; exit 1")
    assert "2 attempts without a newer checkpoint; not started again" in job.attempt("exit 1", max_stalled="2")
    assert len(job.requeued) == 6


def test_attempts_that_are_always_cut_short_have_a_limit_too(job: Job):
    job.attempt(STOPPED)
    (job.run_dir / "slurm" / "job_7" / "stalled").write_text("0 19\n")
    assert "20 attempts without a newer checkpoint; not started again" in job.attempt(STOPPED)


def test_a_save_that_is_too_long_for_the_lead_is_said(job: Job):
    folder = job.run_dir / "stage1" / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"save_s": 90.5}')
    assert "with --lead-s 330" in job.attempt(STOPPED)
    assert "--lead-s" not in job.attempt(STOPPED, lead_s="330")


SAVED = 'mkdir -p "{run}/stage1/checkpoints"; echo step_{n:08d} >"{run}/stage1/checkpoints/latest"; '
OUTCOME = 'echo {} >"$ICCLD_OUTCOME"; exit {}'


def test_what_is_refused_at_once_is_not_started_again_and_what_has_worked_is(job: Job):
    saved = SAVED.format(run=job.run_dir, n=5)
    assert "refused, after it has worked" in job.attempt(saved + OUTCOME.format(2, 2))
    for _ in range(2):
        assert "refused, after it has worked" in job.attempt(OUTCOME.format(2, 2))
    assert "3 attempts without a newer checkpoint" in job.attempt(OUTCOME.format(2, 2))
    assert len(job.requeued) == 3, "the first made a checkpoint"


def test_a_stage_of_ones_own_makes_progress_whatever_its_name(job: Job):
    """Four attempts fail, each with a newer checkpoint: the job goes on."""
    for number in range(4):
        saved = SAVED.replace("stage1", "refine").format(run=job.run_dir, n=number)
        assert "not started again" not in job.attempt(saved + OUTCOME.format(75, 75))
    assert f"refine/step_{number:08d}" in job.log and len(job.requeued) == 4
    checkpoint = job.run_dir / "refine/checkpoints/step_00000003"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text('{"save_s": 90.5}')
    assert "with --lead-s 330" in job.attempt(STOPPED)


def test_a_first_attempt_that_is_refused_is_the_last(job: Job):
    said = job.attempt(OUTCOME.format(2, 2))
    assert "refused; not started again" in said and job.process.returncode == 2 and not job.requeued


def test_what_the_world_ended_is_requeued_until_it_stalls(job: Job):
    for _ in range(2):
        assert "ended with status 75" in job.attempt(OUTCOME.format(75, 75))
    assert "3 attempts without a newer checkpoint" in job.attempt(OUTCOME.format(75, 75))
    assert len(job.requeued) == 2


STATE = ("stalled", "progress", "running_on", "log_begin", "outcome")
TORN = {
    "empty": b"",
    "torn": b"1",
    "garbage": b"\xff\xfe\x00 \x00\n3\t(",
    "words": b"1 abc\n",
    "negative": b"-1 -1\n",
    "octal": b"00 08\n",
    "huge": b"9" * 40 + b" 1\n",
    "long": b"x" * 100_000,
    "hostile": b"a[$(touch hostile)] b[`touch hostile`]\n",
    "option": b"--help\n",
    "glob": b"*\n",
}


@pytest.mark.parametrize("content", TORN.values(), ids=TORN.keys())
@pytest.mark.parametrize("name", STATE)
def test_torn_state_stops_no_job_and_runs_nothing(job: Job, name: str, content: bytes):
    job.attempt("exit 75")
    (job.run_dir / "slurm" / "job_7" / name).write_bytes(content)
    said = job.attempt(f'cd "{job.folder}"; exit 75')
    assert "ended with status 75" in said and len(job.requeued) == 2, said
    assert "line " not in said and "command not found" not in said, "the shell complains of nothing"
    assert not list(job.folder.rglob("hostile")) and not Path("hostile").exists()


def test_names_in_a_strangers_run_say_nothing_that_a_shell_would_run(job: Job):
    hostile = "stage1;$(touch hostile)`touch hostile`\n"
    (job.run_dir / hostile / "final").mkdir(parents=True)
    (job.run_dir / "stage1/checkpoints").mkdir(parents=True)
    (job.run_dir / "stage1/checkpoints/latest").write_text(hostile)
    said = job.attempt("exit 75")
    assert "going on from" in said and not set("$`;()") & set(said.partition("going on from")[2].partition("\n")[0])


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
@pytest.mark.parametrize("name", STATE)
def test_state_that_is_no_plain_file_stops_no_job_and_is_not_followed(job: Job, name: str, kind: str):
    job.attempt("exit 75")
    path, elsewhere = job.run_dir / "slurm" / "job_7" / name, job.folder / "elsewhere"
    path.unlink(missing_ok=True)
    elsewhere.write_text("0\n")
    {"folder": path.mkdir, "link": lambda: path.symlink_to(elsewhere), "pipe": lambda: os.mkfifo(path)}[kind]()
    assert "ended with status 75" in job.attempt("exit 75") and len(job.requeued) == 2
    assert elsewhere.read_text() == "0\n"


def test_a_full_disk_is_said_and_bounded(job: Job):
    """The job's state lies on a disk that is full; the log does not."""
    job.run_dir.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(job.run_dir)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed")
    try:
        (job.run_dir / "filler").write_bytes(b"x" * 4096)
        assert "make room" in job.attempt("exit 75") and job.requeued == ["requeue 7"]
        job.restarts = 30
        assert "not started again" in job.attempt("exit 75") and len(job.requeued) == 1
    finally:
        subprocess.run(["umount", str(job.run_dir)], check=True)


def test_hostile_numbers_of_a_save_run_nothing(job: Job):
    folder = job.run_dir / "stage1" / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    for text in ('{"save_s": 09}', '{"save_s": a[$(touch hostile)]}', '{"save_s": ' + "9" * 40 + "}", "\0{"):
        (folder / "manifest.json").write_text(text)
        said = job.attempt(STOPPED)
        assert "saved: " in said and "value too great" not in said
    assert len(job.requeued) == 4 and not list(job.folder.rglob("hostile"))
