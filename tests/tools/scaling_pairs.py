"""Predicted against measured: two ranks that train alone, two that train together, and their link, taking turns.

python tests/tools/scaling_pairs.py --engine ddp --slow "tbf rate 400mbit burst 64kbit latency 50ms"
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling.links import Network, Took, read_link, summary
from scaling.model import predict
from scaling.profile import read_profile

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}
ADDRESSES = ("10.78.0.1", "10.78.0.2")


class Ranks:
    """Processes of scaling_ranks.py, one thread each; told something, each answers."""

    def __init__(self, engine: str, environments: Sequence[dict[str, str]], commands: Sequence[Sequence[str]]) -> None:
        common = os.environ | ENVIRONMENTS[engine] | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        common["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tools/benchmarks", ROOT / "tools/scripts")))
        self.processes = [
            subprocess.Popen(command, env=common | own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for own, command in zip(environments, commands, strict=True)
        ]

    def tell(self, line: str) -> list[Any]:
        for process in self.processes:
            assert process.stdin
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return self.answers()

    def answers(self) -> list[Any]:
        return [self._answer(process) for process in self.processes]

    def _answer(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout
        for line in process.stdout:  # libraries print there too
            if line.startswith(("{", "[{")):
                return json.loads(line)
        raise RuntimeError(f"a rank ended with status {process.wait()}; its message stands above.")

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def command(words: Sequence[int]) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("scaling_ranks.py")), *(str(word) for word in words)]


def alone(engine: str, words: Sequence[int]) -> Ranks:
    """Two that know nothing of each other, but share the machine as two together do."""
    return Ranks(engine, [{}, {}], [command(words)] * 2)


def together(engine: str, words: Sequence[int], *, namespaces: Sequence[str] = ()) -> Ranks:
    """One process group of two, over the loopback, or each in its namespace."""
    address, device = (ADDRESSES[0], "eth0") if namespaces else ("127.0.0.1", "lo")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": device}
    environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    prefixes = [["ip", "netns", "exec", name] for name in namespaces] or [[], []]
    return Ranks(engine, environments, [[*prefix, *command(words)] for prefix in prefixes])


@contextlib.contextmanager
def two_namespaces(discipline: str) -> Iterator[list[str]]:
    """Joined by a virtual link whose two ends send under the queueing discipline, e.g. `tbf rate ...`.

    Raises CalledProcessError if that is not permitted, or the kernel lacks it.
    """
    names = [f"iccld{os.getpid()}_{rank}" for rank in range(2)]
    try:
        for name in names:
            _do("ip", "netns", "add", name)
        peer = ["peer", "name", "eth0", "netns", names[1]]
        _do("ip", "-n", names[0], "link", "add", "eth0", "type", "veth", *peer)
        for name, address in zip(names, ADDRESSES, strict=True):
            for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "lo", "up"]):
                _do("ip", "-n", name, *words)
            _do("ip", "-n", name, "link", "set", "eth0", "up")
            _do("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", *discipline.split())
        yield names
    finally:
        for name in names:
            subprocess.run([_path("ip"), "netns", "del", name], capture_output=True, check=False)


def _path(name: str) -> str:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or name


def _do(name: str, *words: str) -> None:
    subprocess.run([_path(name), *words], check=True, capture_output=True, text=True, timeout=20)


def compare(
    engine: str, words: Sequence[int], *, rounds: int, steps: int = 3, namespaces: Sequence[str] = ()
) -> dict[str, Any]:
    """Step times in seconds of one rank and of two, predicted from the one rank and the link, and measured."""
    pairs = alone(engine, words), together(engine, words, namespaces=namespaces)
    try:
        for pair in pairs:
            num_parameters = pair.answers()[0]["num_parameters"]
            pair.tell(f"steps {steps}")  # warm-up
        apart, joint, link = [], [], []
        for number in range(rounds):
            # The first step of a turn finds cold caches, and a peer that was not told at the same moment.
            apart.append([own[1:] for own in pairs[0].tell(f"steps {steps + 1}")])
            joint.append([own[1:] for own in pairs[1].tell(f"steps {steps + 1}")])
            if number % 5 == 0:
                link.append(pairs[1].tell("link"))
        return figures_of(engine, words, num_parameters, apart, joint, link)
    finally:
        for pair in pairs:
            pair.stop()


def figures_of(
    engine: str, words: Sequence[int], num_parameters: int, apart: list[Any], joint: list[Any], link: list[Any]
) -> dict[str, Any]:
    """Lists of rounds; in a round the steps of each rank, or rank by rank the times of collectives."""
    ranks = [[step for turn in apart for step in turn[rank]] for rank in range(2)]
    steps = [step for own in ranks for step in own]
    profile = {
        "format": 1,
        "stage": "stage2",
        "engine": engine,
        "world_size": 1,
        "device": "cpu",
        "micro_batch_size": words[1],
        "num_accumulation": 1,
        "gradient_bytes": 4 * num_parameters,
        "ranks": [
            {
                "step_s": [step["step_s"] for step in steps],
                "phases": {name: statistics.median(s["phases"][name] for s in steps) for name in steps[0]["phases"]},
            }
        ],
    }
    times: dict[str, dict[int, list[Took]]] = {}
    for turn in link:
        for collective, by_size in turn[0].items():
            for size, took in by_size.items():
                times.setdefault(collective, {}).setdefault(int(size), []).extend(Took(*pair) for pair in took)
    measured = [max(pair) for turn in joint for pair in zip(*([s["step_s"] for s in own] for own in turn), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("profile.json", "link.json")]
        files[0].write_text(json.dumps(profile))
        fitted = summary(times, num_ranks=2, on_device=False)
        files[1].write_text(json.dumps(fitted))
        network = Network(read_link(files[1]), read_link(files[1]), 8)
        one, two = (predict(read_profile(files[0]), engine, network, n) for n in (1, 2))
    return {
        "engine": engine,
        "one": {"predicted_s": one.step_s, "measured_s": statistics.median(s["step_s"] for s in steps)},
        "two": {"predicted_s": two.step_s, "measured_s": statistics.median(measured)},
        "over_measured": two.step_s / statistics.median(measured),
        "rounds": _ratios(apart, joint),
        "exposed_s": two.exposed_s,
        "straggler_s": two.straggler_s,
        "num_parameters": num_parameters,
        "link": fitted,
        "alone_phases": profile["ranks"][0]["phases"],
        "together_phases": {
            name: statistics.median(s["phases"][name] for turn in joint for own in turn for s in own)
            for name in steps[0]["phases"]
        },
    }


def _ratios(apart: list[Any], joint: list[Any]) -> list[float]:
    """Step time of two over that of one, in each round."""
    medians = [
        [statistics.median(s["step_s"] for own in turn for s in own) for turn in kind] for kind in (joint, apart)
    ]
    return [together / alone for together, alone in zip(*medians, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENVIRONMENTS, default="ddp")
    parser.add_argument("--slow", default="", help="a queueing discipline of tc between two network namespaces")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", nargs=3, type=int, default=(5_000_000, 2, 64), help="parameters, batch, pixels")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # namespaces and ranks go, whatever ends it
    with two_namespaces(arguments.slow) if arguments.slow else contextlib.nullcontext(()) as names:
        print(
            json.dumps(compare(arguments.engine, arguments.size, rounds=arguments.rounds, namespaces=names), indent=1)
        )


if __name__ == "__main__":
    main()
