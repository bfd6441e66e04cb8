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
# Measured: the environment takes 7.3 GB, the wheels on their way 3.3 GB at most.
ENVIRONMENT_MB=7400 WHEELS_MB=3300
# Measured: `make demo` peaks at 9.2 GiB and keeps 1.2 GB of data and runs.
DEMO_GIB=10 DEMO_MB=1300

say() { printf '%s\n' "$*"; }
fail() { say "setup: $*" >&2; exit 1; }

# What installs packages on this system; $1: the Python that is meant, as `python3.13`; empty: whatever there is.
mend() {
    local python=$1 sudo=sudo; [ "$(id -u)" = 0 ] && sudo=
    local system version; system=$(os ID) version=$(os VERSION_ID)
    if [ -z "$python" ]; then
        case $system-$version in ubuntu-22.04) python=python3.11 ;; *) python=python3 ;; esac
    fi
    case $system in
        debian | ubuntu) say "${sudo:+sudo }apt-get install -y $python $python-venv $python-dev g++ make" ;;
        *) say "install Python 3.11 to 3.13 with its venv and headers, g++ and make with this system's packages" ;;
    esac
}

os() { sed -n "s/^$1=\"\{0,1\}\([^\"]*\)\"\{0,1\}$/\1/p" /etc/os-release 2>/dev/null || true; }

# Why an interpreter cannot be used, in a few words; nothing if it can.
unfit() {
    command -v "$1" >/dev/null || { say "not installed"; return; }
    local told
    told=$("$1" -c 'import sys; print(sys.version_info[:2])' 2>&1) || { say "does not start: ${told%%$'\n'*}"; return; }
    case $told in
        "(3, 11)" | "(3, 12)" | "(3, 13)") ;;
        *) say "is ${told//[( )]/}, not 3.11 to 3.13" | tr , .; return ;;
    esac
    "$1" -c 'import venv, ensurepip' 2>/dev/null || say "cannot make a virtual environment: $(mend "$1")"
}

choose_python() {
    local candidate why passed=
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        why=$(unfit "$candidate")
        [ -z "$why" ] && break
        passed+="  $candidate: $why"$'\n'
        candidate=
    done
    if [ -z "$candidate" ]; then
        say "setup: no Python that can be used:" >&2
        printf '%s' "$passed" >&2
        fail "$(mend "")"
    fi
    PYTHON=$candidate
    say "Python $("$PYTHON" -c 'import platform, sys; print(platform.python_version(), sys.executable)')"
    [ -z "$passed" ] || printf 'passed over:\n%s' "$passed"
}

# The environment's own Python, where there is one that works.
environment() {
    local own=$VENV/bin/python
    if [ -x "$own" ] && [ -z "$(unfit "$own")" ]; then
        if [ -n "${PYTHON:-}" ]; then
            local asked is; asked=$("$PYTHON" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null || say "$PYTHON")
            is=$("$own" -c 'import sys; print(sys.version_info[:2])')
            [ "$asked" = "$is" ] || fail "$VENV is of Python $is, PYTHON=$PYTHON is $asked: remove $VENV, or give another VENV"
        fi
        say "$("$own" --version) of $VENV"
        return 1
    fi
}

free_mb() { df -Pm "$1" | awk 'NR == 2 { print $4 }'; }

check_disk() {
    local there=0 need free where=.
    [ -d "$VENV" ] && { there=$(du -sm "$VENV" | cut -f1); where=$VENV; }
    need=$((ENVIRONMENT_MB > there ? ENVIRONMENT_MB - there : 0))
    [ "$need" -lt 200 ] && return
    free=$(free_mb "$where")
    local temporary=${TMPDIR:-/tmp}
    if [ "$(df -P "$where" | awk 'NR == 2 { print $1 }')" = "$(df -P "$temporary" | awk 'NR == 2 { print $1 }')" ]; then
        need=$((need + WHEELS_MB))
    elif [ "$(free_mb "$temporary")" -lt "$WHEELS_MB" ]; then
        fail "$temporary has $(free_mb "$temporary") MB free; wheels on their way need $WHEELS_MB MB: set TMPDIR to another folder"
    fi
    [ "$free" -ge "$need" ] || fail "$(cd "$where" && pwd) has $free MB free; the environment needs $need MB: make room, or set VENV to a folder on another disk"
    [ "$free" -ge $((need + DEMO_MB)) ] || say "note: $free MB of disk are free; \`make demo\` wants $DEMO_MB MB beside the $need MB of the environment"
}

check_machine() {
    local gib; gib=$(awk '/MemTotal/ { print int($2 / 1048576 + 0.5) }' /proc/meminfo)
    [ "$gib" -ge "$DEMO_GIB" ] || say "note: $gib GiB of memory; \`make demo\` wants $DEMO_GIB GiB"
    [ "$(nproc)" -ge 2 ] || say "note: one CPU; recipes want two, or cluster.num_workers=1"
}

# DeepSpeed's op for workers of one machine is compiled; without it they talk over sockets.
compiler_lacks() {
    command -v "${CXX:-c++}" >/dev/null || { say "no C++ compiler (${CXX:-c++})"; return; }
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        say "no headers of $("$1" --version)"
}

# pip's lines as one that moves (on a terminal), or one in 25 packages.
progress() {
    local total done=0 name='' line; total=$(grep -c '==' "$LOCK")
    show() { [ -t 1 ] && printf '\r\033[K%s' "${1:0:78}"; return 0; }
    while IFS= read -r line; do
        case $line in
            Collecting\ * | Requirement\ already\ satisfied:\ * | Ignoring\ *)
                line=${line#Requirement already satisfied: } line=${line#Collecting } line=${line#Ignoring }
                name=${line%%[ :]*} done=$((done + 1))
                show "[$done/$total] $name"
                [ -t 1 ] || [ $((done % 25)) -gt 0 ] || say "[$done/$total]" ;;
            *Downloading*[0-9]\ [GM]B\)*) show "[$done/$total] $name, downloading $(t=${line##*(}; printf %s "${t%)}")" ;;
            *Building\ wheel*) show "[$done/$total] building ${line##*Building wheel for }" ;;
            Installing\ collected*) show unpacking; [ -t 1 ] || say unpacking ;;
        esac
    done
    show ''
}

install() {
    # What was interrupted between a package and its record would count as installed.
    find "$VENV" -name '*.dist-info' -type d -exec sh -c '[ -e "$1/RECORD" ] || rm -r "$1"' _ {} \;
    say "installing $(grep -c '==' "$LOCK") packages of $LOCK; pip's own words are in $LOG"
    pip install --require-hashes --requirement "$LOCK" |& tee -a "$LOG" | progress || pip_failed
    pip install --no-deps --no-build-isolation --editable . >>"$LOG" 2>&1 || pip_failed
}

pip() { "$VENV/bin/python" -u -m pip --disable-pip-version-check --no-input "$@"; }

pip_failed() {
    grep -E '^ *(ERROR|error):?' "$LOG" | tail -5 >&2 || tail -5 "$LOG" >&2
    fail "pip could not install $LOCK (all of it: $LOG); the same command goes on"
}

compile() {
    local lacks; lacks=$(compiler_lacks "$VENV/bin/python")
    if [ -n "$lacks" ]; then
        say "note: $lacks, so workers of one machine exchange gradients over sockets, a little slower: $(mend "")"
        return
    fi
    say "compiling DeepSpeed's op for workers that share a machine's memory (once a machine and Python)"
    DS_ACCELERATOR=cpu "$VENV/bin/python" -c \
        "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)" >>"$LOG" 2>&1 ||
        say "note: it does not compile (why: $LOG), so workers of one machine exchange gradients over sockets"
}

if environment; then
    choose_python
    fresh=yes
fi
check_disk
check_machine
if [ "${1:-}" = --check ]; then
    compiler_lacks "${PYTHON:-$VENV/bin/python}"
    exit
fi
if [ -n "${fresh:-}" ]; then
    lacks=$(compiler_lacks "$PYTHON")
    [ -z "$lacks" ] || say "note: $lacks; all works without, training a little slower. With: $(mend "")"
    "$PYTHON" -m venv --clear "$VENV"
fi
install
compile
