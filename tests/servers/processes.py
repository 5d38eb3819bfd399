"""Starts real memcached and redis-server on private ports or sockets of this machine, and ends them by pid.

I1  A server listens on 127.0.0.1 or on a unix socket below the caller's directory, writes below it alone, and
    has no rights that its starter lacks.
I2  A server ends with its starter: the kernel kills it when the thread that started it is gone.
I3  `stop` and `kill` return when the process is gone and reaped; both may be called again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

__all__ = [
    "Cluster",
    "Server",
    "free_port",
    "missing",
    "start_memcached",
    "start_redis",
    "start_redis_cluster",
]

START: Final = 15.0
"""Seconds within which a server has to answer; a busy machine took 1.5."""
_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


def missing(program: str) -> str | None:
    """Why `program` cannot be started: None if it can."""
    return (
        None
        if shutil.which(program)
        else f"{program} is not installed (Debian: apt-get install {_PACKAGES[program]})"
    )


_PACKAGES = {"memcached": "memcached", "redis-server": "redis-server"}


def free_port(below: int = 65_536) -> int:
    """A TCP port of 127.0.0.1 that nobody listened on a moment ago."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < below:
            return port


class Server:
    """One running server process.

    host, port: where it listens; for a unix socket the socket's path and None. address: both as they stand in
    an engine URL between `://` and the path (also `str(server)`). url: an engine URL. pid: its process.
    """

    def __init__(
        self, scheme: str, command: Sequence[str], directory: Path, host: str, port: int | None, ready: bytes
    ) -> None:
        self.scheme = scheme
        self.command = list(command)
        self.directory = directory
        self.host, self.port = host, port
        self._ready = ready
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"[{self.host}]" if self.port is None else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}/"

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.address}: a running server wanted, a stopped one found"
        return self._process.pid

    def __str__(self) -> str:
        return self.address

    def start(self) -> None:
        """Start (again) on the same port or socket and with no items of before; returns when it answers."""
        assert self._process is None, f"{self.address}: no running server wanted, one found"
        log = self.directory / "log"
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=self.directory,
                preexec_fn=_end_with_parent,
            )
        end = time.monotonic() + START
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(
                    f"{self.command[0]}: an answer on {self.address} wanted, found: {log.read_text()[-500:]}"
                )
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            return self.ask(self._ready) not in (b"", b"-LOADING")
        except OSError:
            return False

    def connect(self, timeout: float = 2.0) -> socket.socket:
        """A new connection to the server, for the caller to close."""
        if self.port is not None:
            return socket.create_connection((self.host, self.port), timeout)
        link = socket.socket(socket.AF_UNIX)
        try:
            link.settimeout(timeout)
            link.connect(self.host)
        except BaseException:
            link.close()
            raise
        return link

    def ask(self, request: bytes, size: int = 65_536) -> bytes:
        """Send bytes on a connection of their own; the first bytes of the answer."""
        with self.connect() as link:
            link.sendall(request)
            return link.recv(size)

    def pause(self) -> None:
        """Stop it from running (SIGSTOP): it accepts connections, by the kernel's backlog, and answers nothing.
        Returns when all its threads have stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        while any(
            (task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()
        ):
            time.sleep(0.001)

    def resume(self) -> None:
        """Let it run again, with its items (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it in order (SIGTERM), killed after 5 seconds. Connections to its port are refused from then on."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once (SIGKILL)."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it and start it again, empty, on the same port or socket."""
        self.kill()
        self.start()

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(how)
            process.send_signal(signal.SIGCONT)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.port is None:
            Path(self.host).unlink(missing_ok=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start_memcached(
    tmp_path: Path, *, unix: bool = False, port: int | None = None, memory: int = 64, args: Sequence[str] = ()
) -> Server:
    """Start memcached.

    Args: tmp_path: a directory; the server gets one of its own in it. unix: listen on a unix socket. port: on
    this port of 127.0.0.1 (None: a free one). memory: MiB for items. args: further arguments, as
    `["-I", "2m"]`.
    """
    directory = _directory(tmp_path, "memcached")
    command = ["memcached", "-m", str(memory), "-t", "2", "-U", "0", *args]
    if os.geteuid() == 0:
        command += ["-u", "root"]

    def make() -> Server:
        if unix:
            path = str(directory / "s")
            return Server(
                "memcached", [*command, "-s", path, "-a", "0700"], directory, path, None, b"version\r\n"
            )
        number = port or free_port()
        return Server(
            "memcached",
            [*command, "-l", "127.0.0.1", "-p", str(number)],
            directory,
            "127.0.0.1",
            number,
            b"version\r\n",
        )

    return _retry(make, port)


def start_redis(
    tmp_path: Path,
    *,
    unix: bool = False,
    port: int | None = None,
    password: str | None = None,
    cluster: bool = False,
    args: Sequence[str] = (),
) -> Server:
    """Start redis-server, without persistence.

    Args: tmp_path, unix, port: as for start_memcached. password: requirepass. cluster: as a node that belongs
    to no cluster yet. args: further arguments, as `["--maxmemory", "2mb"]`.
    """
    directory = _directory(tmp_path, "redis")
    command = [
        "redis-server",
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(directory),
        "--daemonize",
        "no",
        *args,
    ]
    if password is not None:
        command += ["--requirepass", password]

    def make() -> Server:
        if unix:
            path = str(directory / "s")
            command_ = [*command, "--port", "0", "--unixsocket", path, "--unixsocketperm", "700"]
            return Server("redis+unix", command_, directory, path, None, b"PING\r\n")
        number = port or free_port()
        command_ = [*command, "--bind", "127.0.0.1", "--port", str(number)]
        if cluster:
            command_ += [
                "--cluster-enabled",
                "yes",
                "--cluster-port",
                str(free_port()),
                "--cluster-node-timeout",
                "2000",
            ]
        return Server("redis", command_, directory, "127.0.0.1", number, b"PING\r\n")

    return _retry(make, port)


class Cluster:
    """Several redis-server that form a cluster, each a master of an equal share of the slots."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = list(servers)

    @property
    def address(self) -> str:
        return ",".join(server.address for server in self.servers)

    @property
    def url(self) -> str:
        return f"redis+cluster://{self.address}/"

    @property
    def host(self) -> str:
        return self.servers[0].host

    @property
    def port(self) -> int | None:
        return self.servers[0].port

    def __str__(self) -> str:
        return self.address

    def _each(self, act: Callable[[Server], None]) -> None:
        for server in self.servers:
            act(server)

    def pause(self) -> None:
        self._each(Server.pause)

    def resume(self) -> None:
        self._each(Server.resume)

    def stop(self) -> None:
        self._each(Server.stop)

    def kill(self) -> None:
        self._each(Server.kill)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def start_redis_cluster(tmp_path: Path, *, nodes: int = 3, args: Sequence[str] = ()) -> Cluster:
    """Start `nodes` redis-server and join them to a cluster without replicas; returns when each says that it is
    whole."""
    servers: list[Server] = []
    with contextlib.ExitStack() as stack:
        for _ in range(nodes):
            servers.append(stack.enter_context(start_redis(tmp_path, cluster=True, args=args)))
        for i, server in enumerate(servers):
            first, last = 16_384 * i // nodes, 16_384 * (i + 1) // nodes - 1
            _command(server, f"CLUSTER ADDSLOTSRANGE {first} {last}")
            _command(server, f"CLUSTER SET-CONFIG-EPOCH {i + 1}")
        for server in servers[1:]:
            bus = _bus_port(servers[0])
            _command(server, f"CLUSTER MEET {servers[0].host} {servers[0].port} {bus}")
        end = time.monotonic() + START
        for server in servers:
            wanted = (b"cluster_state:ok", b"cluster_known_nodes:%d" % nodes)
            while not all(text in (found := server.ask(b"CLUSTER INFO\r\n")) for text in wanted):
                if time.monotonic() > end:
                    raise RuntimeError(f"cluster: {wanted} wanted of {server.address}, {found[:200]!r} found")
                time.sleep(0.02)
        stack.pop_all()
    return Cluster(servers)


def _command(server: Server, text: str) -> None:
    answer = server.ask(text.encode() + b"\r\n")
    if not answer.startswith(b"+OK"):
        raise RuntimeError(f"{text}: +OK wanted of {server.address}, {answer[:200]!r} found")


def _bus_port(server: Server) -> str:
    return server.command[server.command.index("--cluster-port") + 1]


def _directory(tmp_path: Path, name: str) -> Path:
    for i in range(10_000):
        with contextlib.suppress(FileExistsError):
            path = Path(tmp_path) / f"{name}{i}"
            path.mkdir(mode=0o700)
            return path
    raise AssertionError(f"{tmp_path}: fewer than 10000 directories of {name} wanted")


def _retry(make: Callable[[], Server], port: int | None) -> Server:
    """`make`, three times where the port is free to choose: another may have taken it meanwhile."""
    for _ in range(2):
        try:
            return make()
        except RuntimeError:
            if port is not None:
                raise
    return make()


@contextlib.contextmanager
def paused(server: Server | Cluster) -> Iterator[None]:
    """Stopped (SIGSTOP) inside the block, running again after it."""
    server.pause()
    try:
        yield
    finally:
        server.resume()
