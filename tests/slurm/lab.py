"""A SLURM cluster of its own on this machine: a controller, two nodes with four make-believe GPUs each, and MUNGE.

Where root may make network namespaces each node has its own, so that its link can be cut; elsewhere all nodes are on
loopback. Debian's packages: ``slurmctld slurmd slurm-client munge``. Nothing outlives ``stop``, and nothing outside
``folder`` is touched, except /etc/netns in the first case.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
NODES = (1, 2)
CONF = """\
ClusterName=lab
SlurmctldHost={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits for cred_expire and one second, which is two minutes by default
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
# listen on these addresses only
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={port}
FirstJobId={job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldParameters=node_reg_mem_percent=1
# no cgroups, and nodes may claim more CPUs than there are
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
MailProg=/bin/true
# a node that is gone is missed soon, and welcome when it comes back
ReturnToService=2
SlurmdTimeout=10
KillWait=15
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100
"""


class Lab:
    """``start``, ``stop``, and what tests ask of a cluster in between."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets have short names
        self.port = _free_ports()
        self.separate = os.getuid() == 0 and _may_separate(f"probe{self.port}")
        self.tag = f"lab{self.port}"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._down: dict[str, float] = {}  # job -> since when it waits for a node that is down

    # up and down -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        for name in ("state", "log", "run", *(f"spool-{self.node(n)}" for n in NODES)):
            (self.folder / name).mkdir()
        gpus = [self.folder / f"gpu{n}" for n in range(4)]
        for gpu in gpus:
            gpu.touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self._configure()
        if self.separate:
            self._separate()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        self._munge()
        self._run("slurmctld", 0, "slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf"))
        for n in NODES:
            self.start_node(n)
        self.until(lambda: len(self.sh("sinfo", "-hN", "-p", "debug", "-t", "idle", "-o", "%N").split()) == 2, 30)

    def start_node(self, n: int) -> None:
        self._run(f"slurmd{n}", n, "slurmd", "-D", "-N", self.node(n), "-f", str(self.folder / "slurm.conf"))

    def stop(self) -> None:
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            for arguments in (["--full", "--signal=KILL", "--state=RUNNING"], []):
                self._client("scancel", *arguments, "--user", _user())
            end = time.monotonic() + 20
            while self._client("squeue", "-h").stdout.strip() and time.monotonic() < end:
                time.sleep(0.1)
        for daemon in reversed(list(self.daemons.values())):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        if (self.folder / "run/munged.pid").is_file():
            os.kill(int((self.folder / "run/munged.pid").read_text()), signal.SIGTERM)
        for name in self._spaces() if self.separate else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    # what tests do ---------------------------------------------------------------------------------------------

    def node(self, n: int) -> str:
        return f"n{n}" if self.separate else f"127.0.0.{n}"  # the second: a name that resolves by itself

    def sh(self, *command: str, cwd: Path | None = None, ok: bool = True) -> str:
        """What a client command prints, inside the cluster."""
        done = self._client(*command, cwd=cwd)
        assert not ok or done.returncode == 0, (command, done.stdout, done.stderr)
        return (done.stdout + ("" if ok else done.stderr)).strip()

    def submit(self, folder: Path, *args: str) -> list[str]:
        """``descant submit ARGS`` in ``folder``; the numbers of its jobs."""
        told = self.sh(sys.executable, "-m", "descant", "submit", *args, cwd=folder)
        return re.findall(r"^submitted (\d+)", told, re.MULTILINE)

    def job(self, job: str) -> dict[str, str]:
        words = re.findall(r"(\S+?)=(\S*)", self.sh("scontrol", "show", "job", "--oneliner", job))
        return dict(words)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def ended(self, job: str, seconds: float = 180) -> str:
        """The state of a job when it is over, which a requeued one is not."""
        on = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")
        self.until(lambda: self._free(job) not in on, seconds, job)
        return self.state(job)

    def _free(self, job: str) -> str:
        """The state of a job, for which its operator does what SLURM leaves to one.

        It holds a job that began on a node on its way back, until somebody lets it go, and a node whose processes
        ended too slowly (or that came back unnoticed) stays out of use, until somebody says that it is well again.
        """
        told = self.job(job)
        if told["JobState"] != "PENDING" or "DRAINED" not in told["Reason"]:
            self._down.pop(job, None)
        elif time.monotonic() - self._down.setdefault(job, time.monotonic()) > 40:
            for n in NODES:
                self.sh("scontrol", "update", f"nodename={self.node(n)}", "state=resume", ok=False)
            self._down.pop(job)
        if told["JobState"] == "PENDING" and told["Reason"].startswith("launch_failed_requeued_held"):
            self.sh("scontrol", "release", job)
        return told["JobState"]

    def until(self, true: Callable[[], object], seconds: float = 120, what: str = "it") -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                told = "\n".join(self.sh(*words, ok=False) for words in (("squeue",), ("sinfo", "-R")))
                raise TimeoutError(f"{what}: not within {seconds} s\n{told}")
            time.sleep(0.2)

    def cut_link(self, n: int) -> None:
        """The node lives on, and nobody hears of it."""
        subprocess.run(["ip", "-n", f"{self.tag}-ctl", "link", "set", f"v{n}", "down"], check=True)

    def mend_link(self, n: int) -> None:
        subprocess.run(["ip", "-n", f"{self.tag}-ctl", "link", "set", f"v{n}", "up"], check=True)

    def kill_node(self, n: int, process: int) -> None:
        """The node's daemon is gone without a word, and the rank that ran there."""
        self.daemons[f"slurmd{n}"].kill()
        self.daemons[f"slurmd{n}"].wait()
        os.kill(process, signal.SIGKILL)

    # how -------------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // (len(NODES) + 1)
        nodes = []
        for n in NODES:
            address, host = ("10.77.0." + str(n), f"n{n}") if self.separate else ("127.0.0.1", _host())
            nodes.append(
                f"NodeName={self.node(n)} NodeAddr={address} NodeHostname={host} Port={self.port + n} CPUs=4 "
                f"RealMemory={memory} Gres=gpu:4 State=UNKNOWN"
            )
        controller = "ctl(10.77.0.254)" if self.separate else "localhost(127.0.0.1)"
        # job numbers differ between labs on one machine: Lightning makes its port of them
        values = {"port": self.port, "job": self.port * 7 % 9000 + 1000, "user": _user()}
        text = CONF.format(controller=controller, folder=self.folder, nodes="\n".join(nodes), **values)
        (self.folder / "slurm.conf").write_text(text)

    def _spaces(self) -> list[str]:
        return [f"{self.tag}-{name}" for name in ("ctl", *(f"n{n}" for n in NODES))]

    def _separate(self) -> None:
        """A namespace for the controller, with a bridge, and one for each node, with a cable to it."""
        hosts = "127.0.0.1 localhost\n10.77.0.254 ctl\n" + "".join(f"10.77.0.{n} n{n}\n" for n in NODES)
        control = self._spaces()[0]
        for name in self._spaces():
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            Path("/etc/netns", name).mkdir(parents=True)
            Path("/etc/netns", name, "hosts").write_text(hosts)
        _ip("-n", control, "link", "add", "br0", "type", "bridge")
        _ip("-n", control, "addr", "add", "10.77.0.254/24", "dev", "br0")
        _ip("-n", control, "link", "set", "br0", "up")
        for n in NODES:
            space = f"{self.tag}-n{n}"
            _ip("-n", control, "link", "add", f"v{n}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", control, "link", "set", f"v{n}", "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"10.77.0.{n}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _inside(self, n: int) -> list[str]:
        """What goes before a command to run it on a node, or beside the controller (0)."""
        if not self.separate:
            return []
        host = f"n{n}" if n else "ctl"
        shell = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host]
        return ["ip", "netns", "exec", f"{self.tag}-{host}", *shell]

    def _munge(self) -> None:
        run, log = self.folder / "run", self.folder / "log"
        files = {"socket": run / "munge.sock", "pid-file": run / "munged.pid", "seed-file": run / "munge.seed"}
        files |= {"key-file": self.folder / "munge.key", "log-file": log / "munged.log"}
        command = ["munged", "--force", *(f"--{key}={file}" for key, file in files.items())]
        subprocess.run(command, check=True, capture_output=True)

    def _run(self, name: str, n: int, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [*self._inside(n), *command], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._environment()
            )

    def _client(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._inside(0), *command], cwd=cwd, env=self._environment(), capture_output=True, text=True, timeout=120
        )

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTEST_"))}
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "PATH": path}


def missing() -> list[str]:
    """Programs of the cluster that are not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in NEEDED if shutil.which(name, path=path) is None]


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


def _may_separate(name: str) -> bool:
    if shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made and subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode == 0


def _free_ports() -> int:
    """The first of three ports in a row, outside the range that Lightning makes of job numbers (15000 to 24999)."""
    for port in range(26000 + os.getpid() % 3000, 30000, 3):
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            try:
                for offset, probe in enumerate((one, two, three)):
                    probe.bind(("127.0.0.1", port + offset))
            except OSError:
                continue
            return port
    raise OSError("no three free ports in a row")


def _user() -> str:
    return subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()


def _host() -> str:
    return socket.gethostname().split(".")[0]
