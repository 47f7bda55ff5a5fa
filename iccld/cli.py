"""`iccld <verb>`: one entry to everything."""

import argparse
import os
import re
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from iccld.extras import remedy
from iccld.outcome import REFUSED, status_of, words
from iccld.reading import read_secrets
from iccld.redact import guard_tracebacks, redact
from iccld.suggestions import for_message

if TYPE_CHECKING:
    from iccld.config import Config
    from iccld.runtime.faults.preemption import Preemption

STOPPED = 85  # the outcome of a submitted job that a signal ended, for its script

DESCRIPTION = """\
Train segmentation models on labelled source images and unlabelled target images.

  iccld train experiment=gta5_to_cityscapes run_dir=runs/a   train; the same command resumes
  iccld submit --nodes 2 train run_dir=runs/a                the same as a SLURM job
  iccld evaluate runs/a inference.num_steps=[1,4]            score the finished stages
  iccld predict runs/a image.jpg out/                        label PNG and overlay
  iccld shards make --dataset gta5 --input DIR --output DIR  turn a data set into shards
  iccld shards index|verify|info DIR                         index tars, check, describe
  iccld checkpoint list|verify|export|convert DIR            look at them, get models out of them
  iccld profile experiment=... run_dir=runs/a                where a step's time and memory go
  iccld goodput runs/a                                       where the wall time of a run went
  iccld ablate GRID.yaml --output runs/ablation              runs x seeds, compared and reported

Any setting is changed by key=value; `iccld config experiment=...` shows all of them.
For several ranks on this machine: python launch/local.py NUM_RANKS VERB ...
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. What ends it is one line on stderr, and an exit status of `outcome`.

    A reader of the output that has enough of it, as `head` has, ends it in silence with 141: 128 + SIGPIPE.
    """
    try:
        try:
            arguments = parse(argv)
            return _run(arguments, sys.argv[1:] if argv is None else argv)
        except ModuleNotFoundError as missing:
            print(f"iccld: this command {remedy(missing)}", file=sys.stderr, flush=True)
            return REFUSED
        finally:
            for stream in _outputs():
                stream.flush()  # or the interpreter would do so at its end, and complain
    except (OSError, SystemExit) as end:
        error = end.__context__ if isinstance(end, SystemExit) else end  # rich exits where a pipe is broken
        if not isinstance(error, OSError if error is end else BrokenPipeError):
            raise
        if not isinstance(error, BrokenPipeError):
            with suppress(OSError):  # nor this, perhaps
                print(f"iccld: the output cannot be written ({error.strerror}).", file=sys.stderr, flush=True)
        for stream in _outputs():
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # takes what is left in buffers
        return 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else status_of(error)


def _outputs() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # None: closed by who started us


def _run(arguments: argparse.Namespace, words_given: Sequence[str]) -> int:
    given = list(words_given)
    guard_tracebacks(given)
    try:
        if getattr(arguments, "secrets", []):
            arguments.overrides = settings_of(arguments)
            given += arguments.overrides
            guard_tracebacks(given)
        return arguments.run(arguments) or 0
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _readers_are_gone():
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:  # ranks that fail alike are ended before they repeat it; one that fails alone speaks
            time.sleep(3)
        line = f"iccld {arguments.verb}: {f'rank {rank}: ' if rank else ''}{redact(words(error), given)}"
        print("".join(map(_printable, line)), file=sys.stderr, flush=True)
        return status_of(error)


def _printable(character: str) -> str:
    """What a terminal would take for a command, as text: names come from files that anyone wrote."""
    return character if character.isprintable() or character == "\n" else repr(character)[1:-1]


def run() -> NoReturn:
    """Run the verb of the command line, and end the process."""
    from iccld.runtime.faults.ending import run_to_the_end

    run_to_the_end(main)


def _readers_are_gone() -> bool:
    """Whether nobody reads our output; a broken pipe may also be a server's."""
    pipes = select.poll()
    for stream in _outputs():
        with suppress(OSError, ValueError):  # a stream of a test's is no file
            pipes.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in pipes.poll(0))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Of all verbs; light, as long as none is run. Settings may also stand after an option."""
    top = _parser()
    arguments, left = top.parse_known_args(argv)
    if stray := [word for word in left if word.startswith("-") or "=" not in word or "overrides" not in arguments]:
        top.error(f"unrecognized arguments: {' '.join(stray)}")
    if left:
        arguments.overrides += left
    return arguments


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """The settings of the files of `--secrets`, then those of the command line, which override them.

    Raises ValueError, and OSError where a file cannot be read.
    """
    return [*(word for path in arguments.secrets for word in read_secrets(path)), *arguments.overrides]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        near, remedy = for_message(message), f"`{self.prog} --help` shows what can be given"
        self.exit(REFUSED, f"{redact(f'{self.prog}: {message}{near}', sys.argv)} ({remedy})\n")


def _parser() -> argparse.ArgumentParser:
    top = _Parser("iccld", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter, add_help=False)
    top.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser("train")
    train.set_defaults(run=_train)
    config = verbs.add_parser("config")
    config.set_defaults(run=_config)
    for parser_of_verb in (train, config):
        parser_of_verb.add_argument("overrides", nargs="*", metavar="key=value")
        parser_of_verb.add_argument("--config-dir", default="", help="a folder with YAML groups of your own")

    evaluate = verbs.add_parser("evaluate")
    evaluate.add_argument("run_dir", type=Path)
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate.add_argument("--model", default="", help="a model folder to score instead of the run's own")
    evaluate.set_defaults(run=_evaluate)

    predict = verbs.add_parser("predict")
    predict.add_argument("model", type=Path, help="a model folder or a run directory")
    predict.add_argument("input", type=Path)
    predict.add_argument("output", type=Path)
    predict.add_argument("--num-steps", type=int, default=0, help="denoising steps; 0 (default): the decoder alone")
    predict.add_argument("--size", default="", metavar="HxW", help="resize images for the model, as in 512x1024")
    predict.add_argument("--sliding-window", action="store_true")
    predict.add_argument("--attention", choices=["sdpa", "xformers"], default="sdpa", help="back end of the denoiser")
    predict.set_defaults(run=_predict)

    _add_program_verbs(verbs)
    about = "a file of yours alone (mode 0600) with key=value lines, which other users do not see as they do a command"
    for name in ("train", "config", "evaluate", "profile"):
        verbs.choices[name].add_argument(
            "--secrets", type=Path, action="append", default=[], metavar="FILE", help=about
        )
    _add_shards(verbs)
    _add_checkpoint(verbs)
    return top


def _add_program_verbs(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    from iccld.programs import doctor, goodput
    from iccld.programs.ablate import command as ablation
    from iccld.programs.submit import submit

    submission = verbs.add_parser("submit", description=submit.DESCRIPTION)
    submit.add_arguments(submission)
    submission.set_defaults(run=submit.submit)
    profiler = verbs.add_parser("profile")
    add = profiler.add_argument
    add("overrides", nargs="*", metavar="key=value", help="as for train")
    add("--config-dir", default="", help="a folder with YAML groups of your own")
    add("--num-steps", type=int, default=20, help="that are timed (default %(default)s)")
    add("--num-warmup", type=int, default=5, help="left out before them (default %(default)s)")
    add("--num-traced", type=int, default=3, help="in a trace, after them (default %(default)s)")
    add("--synthetic", action="store_true", help="batches from memory: what is left is not the loader's")
    add("--output", type=Path, metavar="FOLDER", help="for the reports (RUN_DIR/profile)")
    profiler.set_defaults(run=_profile)
    ledger = verbs.add_parser("goodput")
    goodput.add_arguments(ledger)
    ledger.set_defaults(run=goodput.run)
    examination = verbs.add_parser("doctor", description=doctor.DESCRIPTION)
    doctor.add_arguments(examination)
    examination.set_defaults(run=doctor.run)
    comparison = verbs.add_parser("ablate", description=ablation.DESCRIPTION)
    ablation.add_arguments(comparison)
    comparison.set_defaults(run=ablation.run)


def _add_shards(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    shards = verbs.add_parser("shards")
    actions = shards.add_subparsers(dest="action", required=True, metavar="ACTION")
    from iccld.data.shards import describing as info
    from iccld.data.shards import indexing, making
    from iccld.data.shards import verifying as verify

    for name, action, summary in (
        ("make", making, "convert a data set to tars and an index"),
        ("index", indexing, "index tars that were made elsewhere"),
        ("verify", verify, "read everything once, and name what is broken"),
        ("info", info, "show counts, sizes and class shares"),
    ):
        parser_of_action = actions.add_parser(name, help=summary)
        action.add_arguments(parser_of_action)
        parser_of_action.set_defaults(run=_shards, act=action.run)


def _add_checkpoint(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    checkpoint = verbs.add_parser("checkpoint")
    checkpoint.set_defaults(run=_checkpoint)
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in (("list", "steps, sizes, engine, ranks"), ("verify", "compare every file's checksum")):
        action = actions.add_parser(name, help=summary)
        action.add_argument("folder", type=Path, help="a run directory, or one checkpoint")
    export = actions.add_parser("export", help="write a model folder that ICCLD.from_pretrained loads")
    export.add_argument("--weights", choices=["teacher", "student"], default="teacher")
    about = "copy into another number of files (to resume on other ranks or engines, nothing needs converting)"
    convert = actions.add_parser("convert", help=about, description=about)
    convert.add_argument("--num-files", type=int, required=True)
    for action in (export, convert):
        action.add_argument("folder", type=Path, metavar="checkpoint")
        action.add_argument("output", type=Path)


# The verbs import what they need when they run, so that `--help` and shard making do not wait for torch.


def _train(arguments: argparse.Namespace) -> int:
    from iccld.runtime.faults.preemption import Preemption

    began = float(os.environ.get("ICCLD_ATTEMPT_BEGAN") or time.time())  # the job script's word, else now
    with Preemption() as preemption:  # before the imports, which take seconds
        from iccld.config import load_config
        from iccld.programs.train.train import train

        config = load_config(arguments.overrides, config_dir=arguments.config_dir)
        finished = train(config, preemption, began=began)
    return 0 if finished else _stopped(config, preemption, "iccld train: stopped by a signal; the same command goes on")


def _stopped(config: "Config", preemption: "Preemption", message: str) -> int:
    """A job script is told in its own way, whatever the configured status; Ctrl-C ends a process of its own with 130.

    Of several ranks the launcher knows of Ctrl-C, and takes any status of a rank but 0 for a failure.
    """
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)
    if "ICCLD_OUTCOME" in os.environ:
        return STOPPED
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    by_hand = 128 + signal.SIGINT if preemption.by_hand and alone else 0
    return config.preemption.exit_status or by_hand


def _config(arguments: argparse.Namespace) -> None:
    from iccld.config import load_config, to_yaml

    print(to_yaml(load_config(arguments.overrides, config_dir=arguments.config_dir)), end="")


def _profile(arguments: argparse.Namespace) -> int:
    from iccld.programs.profile.profile import run

    return run(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from iccld.runtime.faults.preemption import Preemption

    with Preemption() as preemption:
        from iccld.programs.evaluate.evaluate import evaluate_run, saved_settings

        config = saved_settings(arguments.run_dir, arguments.overrides)
        finished = evaluate_run(config, preemption, model_folder=arguments.model)
    return (
        0
        if finished
        else _stopped(config, preemption, "iccld evaluate: stopped by a signal; the same command begins again")
    )


def _predict(arguments: argparse.Namespace) -> None:
    from iccld.evaluation import EvaluationConfig
    from iccld.models.attention import AttentionBackend
    from iccld.programs.predict import predict_images

    if arguments.size and not re.fullmatch(r"\d+x\d+", arguments.size):
        raise ValueError(f"--size {arguments.size} must be HEIGHTxWIDTH, as in 512x1024.")
    image_size = [int(side) for side in arguments.size.split("x")] if arguments.size else []
    predict_images(
        arguments.model,
        arguments.input,
        arguments.output,
        num_steps=arguments.num_steps,
        config=EvaluationConfig(image_size=image_size, sliding_window=arguments.sliding_window),
        attention=AttentionBackend[arguments.attention],
    )


def _checkpoint(arguments: argparse.Namespace) -> int:
    from iccld.programs.checkpoint import run

    return run(arguments)


def _shards(arguments: argparse.Namespace) -> int:
    from iccld.data.processes import Stopped, stoppable

    try:
        with stoppable():
            return arguments.act(arguments)
    except Stopped as stopped:
        again = "goes on" if arguments.action == "make" else "starts anew"
        print(f"iccld shards {arguments.action}: {stopped}; the same command {again}", file=sys.stderr, flush=True)
        return 128 + stopped.signal


if __name__ == "__main__":
    run()
