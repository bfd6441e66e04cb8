#!/usr/bin/env bash
# Makes the virtual environment. Looks for all that is missing before anything is downloaded, and says what mends it.
#
#   make setup                        # or: ./setup.sh
#   PYTHON=python3.12 make setup      # with this Python; else the newest of 3.13, 3.12, 3.11 that can
#   ./setup.sh --check                # only look
#
# May be stopped at any time: the same command goes on.
set -euo pipefail
cd "$(dirname "$0")"

VENV=${VENV:-.venv}
LOCK=${LOCK:-requirements-dev.lock}
LOG=$VENV/setup.log
ENVIRONMENT_MB=7400 # measured, with all packages
WHEELS_MB=3500      # measured: the wheels on their way
DEMO_MB=4200        # `make demo` leaves 3.4 GB; the files of the sound packages come and go
DEMO_GIB=11         # measured: its peak is 9.2 to 10.5

say() { printf '%s\n' "$*"; }
fail() { say "setup: $*" >&2; exit 1; }

# --- What is there, and what mends it ----------------------------------------------------------------------------

os() { sed -n "s/^$1=\"\{0,1\}\([^\"]*\)\"\{0,1\}$/\1/p" "${OS_RELEASE:-/etc/os-release}" 2>/dev/null || true; }

# The command that installs a Python with venv on this system; $1: which one, as `python3.13`.
mend() {
    local python=${1:-python3} sudo='sudo '
    [ "$(id -u)" != 0 ] || sudo=
    [ "$(os ID)-$(os VERSION_ID)-$python" != ubuntu-22.04-python3 ] || python=python3.11
    case $(os ID) in
        debian | ubuntu) say "${sudo}apt-get install -y $python $python-venv make" ;;
        *) say "install Python 3.11 to 3.13 with its venv, and make, from this system's packages" ;;
    esac
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1; }

# Why an interpreter cannot be used, in a few words; nothing if it can.
unfit() {
    local version
    command -v "$1" >/dev/null || { say "not installed"; return; }
    version=$(version_of "$1") || { say "does not start: ${version%%$'\n'*}"; return; }
    case $version in 3.11 | 3.12 | 3.13) ;; *) say "is $version, not 3.11 to 3.13"; return ;; esac
    "$1" -c 'import venv, ensurepip' 2>/dev/null || say "cannot make a virtual environment: $(mend "$1")"
}

choose_python() {
    local candidate why chosen='' passed=''
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        why=$(unfit "$candidate")
        [ -n "$why" ] || { chosen=$candidate; break; }
        passed+="  $candidate: $why"$'\n'
    done
    [ -n "$chosen" ] || fail $'no Python that can be used:\n'"$passed"$'What helps:\n  '"$(mend)"
    PYTHON=$chosen
    say "Python $("$PYTHON" -c 'import platform, sys; print(platform.python_version(), sys.executable)')"
    [ -z "$passed" ] || printf 'passed over:\n%s' "$passed"
}

# An environment that is there and works stays; another Python that is asked for needs another folder.
keep_environment() {
    local own=$VENV/bin/python version
    # One that was stopped while it was made has no pip, or no whole one: it is made anew.
    [ -x "$own" ] && [ -z "$(unfit "$own")" ] && "$own" -m pip --version >/dev/null 2>&1 || return 1
    version=$(version_of "$own")
    if [ -n "${PYTHON:-}" ] && [ "$(version_of "$PYTHON")" != "$version" ]; then
        fail "$VENV is of Python $version, not of $PYTHON as asked for: remove it, or name another folder (VENV=...)"
    fi
    PYTHON=$own
    say "Python $version of $VENV"
}

free_mb() { df -Pm "$1" | awk 'NR == 2 { print $4 }'; }
disk_of() { df -P "$1" | awk 'NR == 2 { print $1 }'; }

check_disk() {
    local there=0 where=. need free temporary=${TMPDIR:-/tmp}
    if [ -d "$VENV" ]; then there=$(du -sm "$VENV" | cut -f1) where=$VENV; fi
    need=$((ENVIRONMENT_MB - there))
    [ "$need" -gt 200 ] || return 0
    if [ "$(disk_of "$where")" = "$(disk_of "$temporary")" ]; then
        need=$((need + WHEELS_MB))
    elif [ "$(free_mb "$temporary")" -lt "$WHEELS_MB" ]; then
        free=$(free_mb "$temporary")
        fail "$temporary has $free MB free; wheels on their way need $WHEELS_MB MB: set TMPDIR to another folder"
    fi
    free=$(free_mb "$where")
    where=$(cd "$where" && pwd)
    [ "$free" -ge "$need" ] ||
        fail "$where has $free MB free; the environment needs $need MB: make room, or put it elsewhere (VENV=...)"
    [ "$free" -ge $((need + DEMO_MB)) ] ||
        say "note: $free MB of disk are free; \`make demo\` wants $DEMO_MB MB beside the $need MB of the environment"
}

check_machine() {
    local gib
    gib=$(awk '/MemTotal/ { print int($2 / 1048576 + 0.5) }' /proc/meminfo)
    [ "$gib" -ge "$DEMO_GIB" ] || say "note: $gib GiB of memory; \`make demo\` wants $DEMO_GIB"
    [ "$(nproc)" -ge 2 ] || say "note: one CPU; recipes want two, or cluster.num_workers=1"
}

# --- Making it ---------------------------------------------------------------------------------------------------

pip() { "$VENV/bin/python" -u -m pip --disable-pip-version-check --no-input "$@"; }

pip_failed() {
    grep -E '^ *(ERROR|error):?' "$LOG" | tail -5 >&2 || tail -5 "$LOG" >&2
    fail "pip could not install $LOCK ($LOG has all it said); the same command goes on"
}

# pip's lines as one that moves (on a terminal), or one in 25 packages.
progress() {
    local total done=0 name='' line
    total=$(grep -c '==' "$LOCK")
    show() { [ ! -t 1 ] || printf '\r\033[K%s' "${1:0:78}"; }
    while IFS= read -r line; do
        case $line in
            Collecting\ * | Requirement\ already\ satisfied:\ * | Ignoring\ *)
                line=${line#Requirement already satisfied: } line=${line#Collecting } line=${line#Ignoring }
                name=${line%%[ :]*} done=$((done < total ? done + 1 : total))
                show "[$done/$total] $name"
                [ -t 1 ] || [ $((done % 25)) -gt 0 ] || say "[$done/$total]" ;;
            *Downloading*[0-9]\ [GM]B\)*) line=${line##*(}; show "[$done/$total] $name, downloading ${line%)*}" ;;
            *Building\ wheel\ for*) line=${line##*Building wheel for }; show "[$done/$total] building ${line%% *}" ;;
            Installing\ collected*) show unpacking; [ -t 1 ] || say unpacking ;;
        esac
    done
    show ''
}

install() {
    # A package that was cut off between its files and its record would count as installed.
    find "$VENV" -name '*.dist-info' -type d -exec sh -c '[ -e "$1/RECORD" ] || rm -r "$1"' _ {} \;
    say "installing $(grep -c '==' "$LOCK") packages of $LOCK"
    pip install --require-hashes --requirement "$LOCK" |& tee -a "$LOG" | progress || pip_failed
    pip install --no-deps --no-build-isolation --editable . >>"$LOG" 2>&1 || pip_failed
}

keep_environment || choose_python
check_disk
check_machine
[ "${1:-}" != --check ] || exit 0
[ "$PYTHON" = "$VENV/bin/python" ] || "$PYTHON" -m venv --clear "$VENV"
install
say "ready: . $VENV/bin/activate"
