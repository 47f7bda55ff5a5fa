"""A cluster whose nodes have an address, a host name and a link of their own, in network namespaces."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

from tests.slurm.cluster import Cluster, config_text
from tests.slurm.install import PATH

NETWORK = "10.77.0"


class NamespaceCluster(Cluster):
    """Needs CAP_SYS_ADMIN and CAP_NET_ADMIN. The controller is `ctl`; nodes are joined by its bridge."""

    def __init__(self, *, num_nodes: int = 3) -> None:
        super().__init__(num_nodes=num_nodes)
        self.prefix = f"iccld{os.getpid()}_"
        self.addresses = {"ctl": f"{NETWORK}.1"} | {name: f"{NETWORK}.{10 + i}" for i, name in enumerate(self.names)}

    def _start(self) -> None:
        hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        for name, address in self.addresses.items():
            own = Path("/etc/netns") / f"{self.prefix}{name}"
            own.mkdir(parents=True)
            (own / "hosts").write_text(hosts)  # seen as /etc/hosts within
            ip("netns", "add", f"{self.prefix}{name}")
            self.link(name, "link", "set", "lo", "up")
            if name == "ctl":
                self.link("ctl", "link", "add", "br0", "type", "bridge")
                self.link("ctl", "addr", "add", f"{address}/24", "dev", "br0")
                self.link("ctl", "link", "set", "br0", "up")
                continue
            peer = ["peer", "name", "eth0", "netns", f"{self.prefix}{name}"]
            self.link("ctl", "link", "add", f"to_{name}", "type", "veth", *peer)
            self.link("ctl", "link", "set", f"to_{name}", "master", "br0", "up")
            self.link(name, "addr", "add", f"{address}/24", "dev", "eth0")
            self.link(name, "link", "set", "eth0", "up")
        super()._start()

    def config(self) -> str:
        nodes = [
            f"NodeName={n} NodeHostname={n} NodeAddr={self.addresses[n]} CPUs=2 RealMemory=4000" for n in self.names
        ]
        return config_text(self.home, f"ctl({self.addresses['ctl']})", 6817, "\n".join(nodes))

    def on_controller(self) -> list[str]:
        return self.on_node("ctl")

    def on_node(self, name: str) -> list[str]:
        named = ["unshare", "-u", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]
        return [str(shutil.which("ip", path=PATH)), "netns", "exec", f"{self.prefix}{name}", *named]

    def link(self, where: str, *words: str) -> None:
        """`ip` within a node's namespace."""
        ip("-n", f"{self.prefix}{where}", *words)

    def cut(self, name: str) -> None:
        self.link("ctl", "link", "set", f"to_{name}", "down")

    def mend(self, name: str) -> None:
        self.link("ctl", "link", "set", f"to_{name}", "up")

    def stop(self) -> None:
        super().stop()
        for name in self.addresses:
            with contextlib.suppress(subprocess.SubprocessError):
                ip("netns", "del", f"{self.prefix}{name}")
            shutil.rmtree(f"/etc/netns/{self.prefix}{name}", ignore_errors=True)


def ip(*words: str) -> None:
    subprocess.run([str(shutil.which("ip", path=PATH)), *words], check=True, capture_output=True, timeout=20)
