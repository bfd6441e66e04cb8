"""`setup.sh --check`: what it finds missing and what mends it, with stand-ins for the system's programs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("bash", "sed", "awk", "du", "id", "grep", "cut", "tr", "dirname", "cat", "find", "sh", "rm", "env")
SYSTEMS = {
    "Debian 12": ("debian", "12", "python3"),
    "Debian 13": ("debian", "13", "python3"),
    "Ubuntu 22.04": ("ubuntu", "22.04", "python3.11"),
    "Ubuntu 24.04": ("ubuntu", "24.04", "python3"),
}


class Machine:
    """A folder of programs, which is all of PATH, and a system's name."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.release, self.venv = folder / "bin", folder / "os-release", folder / "venv"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.program("nproc", "echo 2")
        self.disk(50_000)
        self.system("debian", "13")

    def program(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def python(self, name: str, version: str, *, venv: bool = True) -> None:
        self.program(
            name,
            f"""case "$2" in
                *platform*) echo "3.{version} /usr/bin/{name}" ;;
                *version_info*) echo 3.{version} ;;
                *ensurepip*) exit {int(not venv)} ;;
                *) [ "$1" != --version ] || echo "Python 3.{version}" ;;
            esac""",
        )

    def system(self, name: str, version: str) -> None:
        self.release.write_text(f'PRETTY_NAME="x"\nID={name}\nVERSION_ID="{version}"\n')

    def disk(self, free_mb: int) -> None:
        self.program("df", f'echo "Filesystem 1M-blocks Used Available"; echo "/dev/x 9 9 {free_mb} 1% /"')

    def check(self, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(ROOT / "setup.sh"), "--check"],
            env={"PATH": str(self.bin), "OS_RELEASE": str(self.release), "VENV": str(self.venv), **environment},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert not self.venv.exists(), "it only looks"
        return done


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_newest_python_is_taken(machine: Machine) -> None:
    for minor in ("11", "13", "12"):
        machine.python(f"python3.{minor}", minor)
    done = machine.check()
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "Python 3.13 /usr/bin/python3.13")
    assert machine.check(PYTHON="python3.11").stdout.startswith("Python 3.11 ")


def test_one_that_cannot_make_an_environment_is_passed_over_by_name(machine: Machine) -> None:
    machine.python("python3.13", "13", venv=False)
    machine.program("python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    machine.python("python3.11", "11")
    told = machine.check().stdout
    assert told.startswith("Python 3.11 ")
    assert "python3.13: cannot make a virtual environment" in told
    assert "apt-get install -y python3.13 python3.13-venv make" in told
    assert "python3.12: does not start: pyenv: python3.12: command not found" in told


@pytest.mark.parametrize("system", SYSTEMS)
def test_without_a_python_the_system_s_command_is_given(machine: Machine, system: str) -> None:
    name, version, python = SYSTEMS[system]
    machine.system(name, version)
    machine.python("python3", "10")
    done = machine.check()
    assert done.returncode == 1
    assert "python3: is 3.10, not 3.11 to 3.13" in done.stderr
    assert f"apt-get install -y {python} {python}-venv make" in done.stderr


def test_on_another_system_it_says_what_is_needed(machine: Machine) -> None:
    machine.system("arch", "1")
    assert "install Python 3.11 to 3.13" in machine.check().stderr


def test_too_little_disk_is_said_before_anything_is_downloaded(machine: Machine) -> None:
    machine.python("python3.13", "13")
    machine.disk(3_000)
    done = machine.check()
    assert done.returncode == 1
    assert "has 3000 MB free; the environment needs" in done.stderr


def test_few_cores_are_told(machine: Machine) -> None:
    machine.python("python3.13", "13")
    machine.program("nproc", "echo 1")
    assert "one CPU; recipes want two" in machine.check().stdout
