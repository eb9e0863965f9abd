"""A private PostgreSQL on loopback for a test session, from the installed binaries; gone when the session is."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

UNPRIVILEGED = "postgres"
PASSWORD = "not-to-be-shown"


def find_binaries() -> Path | None:
    """Where ``initdb`` and ``postgres`` are: newest Debian version first, then the search path."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    on_path = shutil.which("initdb")
    for folder in [*debian, *([Path(on_path).parent] if on_path else [])]:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    return None


class PostgresqlServer:
    """Starts at once; ``stop`` removes its files. The superuser is ``tester``, asked for a password."""

    def __init__(self, binaries: Path) -> None:
        self.binaries = binaries
        self.folder = Path(tempfile.mkdtemp(prefix="skipplan-postgresql-"))
        self.port = _free_port()
        password = self.folder / "password"
        password.write_text(PASSWORD)
        if os.geteuid() == 0:  # initdb refuses to run as root
            for path in (self.folder, password):
                shutil.chown(path, UNPRIVILEGED, UNPRIVILEGED)
        self._run(
            "initdb", "-D", str(self.folder / "data"), "-U", "tester", "-A", "scram-sha-256", "-E", "UTF8", "--no-sync",
            "--locale=C", f"--pwfile={password}",
        )  # fmt: skip
        self._process: subprocess.Popen[bytes]
        self.start()

    def url(self, database: str = "postgres") -> str:
        """The URL of one of its databases."""
        return f"postgresql://tester:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "shared_buffers": "64MB",
            "max_connections": 60,
            "autovacuum": "off",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix(), str(self.binaries / "postgres"), "-D", str(self.folder / "data"), *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url(), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.folder / "log").read_text()[-2000:]) from None
                time.sleep(0.02)

    def halt(self) -> None:
        """Shut down, breaking all connections; ``start`` brings it back with its data."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)

    def stop(self) -> None:
        """Shut down and remove all files."""
        self._process.send_signal(signal.SIGQUIT)  # nothing is worth a checkpoint any more
        self._process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prefix(self) -> list[str]:
        """Run unprivileged, and die with the tests even if they are killed."""
        setpriv = shutil.which("setpriv")
        if os.geteuid() != 0:
            return [setpriv, "--pdeathsig", "INT"] if setpriv else []
        if setpriv is None:
            raise RuntimeError("setpriv (util-linux) is needed to start PostgreSQL as root")
        user = ["--reuid", UNPRIVILEGED, "--regid", UNPRIVILEGED, "--init-groups"]
        return [setpriv, *user, "--pdeathsig", "INT"]

    def _run(self, program: str, *arguments: str) -> None:
        result = subprocess.run(
            [*self._prefix(), str(self.binaries / program), *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(f"{program}: {result.stderr}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
