"""Ranks of a job step without an agent: each task is one rank, and SLURM's variables tell its place and rank 0's."""

import fcntl
import socket
import struct
from collections.abc import Mapping

FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below the range from which systems hand out ports themselves
PORT_STRIDE = 7919
_SIOCGIFADDR = 0x8915


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torch and accelerate read, from those that srun sets; those that are set stay.

    The result is empty if a launcher has formed the ranks. Raises ValueError outside a job step.
    """
    if "RANK" in environment:
        return {}
    try:
        rank, local_rank = environment["SLURM_PROCID"], environment["SLURM_LOCALID"]
        world_size, node_rank = environment["SLURM_STEP_NUM_TASKS"], environment["SLURM_NODEID"]
        # srun's own node is the job's first, where rank 0 is; its address is right also where names do not resolve.
        address, job = environment["SLURM_LAUNCH_NODE_IPADDR"], environment["SLURM_JOB_ID"]
        tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is not set: this is no task of a job step; start it with srun.") from error
    formed = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": str(tasks[int(node_rank)]),
        "NODE_RANK": node_rank,
        "MASTER_ADDR": address,
        "MASTER_PORT": str(master_port(int(job), restart=int(environment.get("SLURM_RESTART_COUNT", "0")))),
    }
    return {name: value for name, value in formed.items() if name not in environment}


def tasks_per_node(text: str) -> list[int]:
    """Expand SLURM's `2(x3),1` to [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.rstrip(")") or 1)
    return tasks


def master_port(job: int, *, restart: int = 0) -> int:
    """Return a port that is the same on every node, without asking.

    Jobs that share a node have other ports, and so have attempts of one job: left-overs of an earlier one may hold its
    port.
    """
    return FIRST_PORT + (job + PORT_STRIDE * restart) % NUM_PORTS


def missing_gpus(environment: Mapping[str, str], *, num_seen: int) -> str:
    """Say which GPUs of the allocation a process does not see; "" if there are all, or none were asked for.

    SLURM names the GPUs of a task in CUDA_VISIBLE_DEVICES; a user who empties it wants none.
    """
    granted, visible = environment.get("SLURM_GPUS_ON_NODE", "0"), environment.get("CUDA_VISIBLE_DEVICES")
    wanted = (min(1, int(granted)) if visible is None else len(visible.split(","))) if granted.isdigit() else 0
    if granted == "0" or visible in ("", "-1") or num_seen >= wanted:
        return ""
    return f"SLURM has given this task {wanted} GPUs, and torch sees {num_seen} (in a container: is it given them?)"


def interface_towards(address: str) -> str:
    """Return the network interface by which this machine reaches another; "" if it has no name.

    It is also "" where IPv4 does not reach the address: it is one of IPv6, or its network is down.

    Gloo would look up the machine's own name, and if that does not resolve, tell the others 127.0.0.1.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError:
            return ""
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return ""
