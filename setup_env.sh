#!/usr/bin/env bash
# Makes sure that `python` has what requirements.txt asks for. Run it, or source it to have that `python`:
#
#     source setup_env.sh                 what a run needs
#     SETUP_DEV=1 source setup_env.sh     what the tests need as well (requirements-dev.txt)
#
# Which environment, the first that fits:
#   1. the active one (VIRTUAL_ENV or conda), when it has everything: used as it is, never changed;
#   2. $VENV, by default .venv beside this script (a relative path counts from here), when it is set or there;
#   3. the `python` of this shell, when it has everything: used as it is;
#   4. otherwise $VENV is made with $PYTHON (default python3), and the requirements are installed there once.
# A stamp inside $VENV names the requirement files that were installed; when they change, pip runs again.
# Silent when there is nothing to do; speaks on standard error.

_setup_env_say() { printf 'setup_env.sh: %s\n' "$*" >&2; }

# _setup_env_has PYTHON FILE...: does this interpreter have what the files ask for? Reads metadata only, imports
# no package. A line that this short check does not understand counts as missing: then pip decides.
_setup_env_has() {
    "$1" - "${@:2}" <<'PYTHON' 2>/dev/null
import re
import sys
from importlib import metadata


def need(condition):  # not `assert`, which PYTHONOPTIMIZE removes
    if not condition:
        sys.exit(1)


need(sys.version_info >= (3, 10))
COMPARE = {
    ">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b, ">": lambda a, b: a > b, "<": lambda a, b: a < b,
}


def key(version):  # "2.9.0rc1+cpu" -> ((2, 9), not a pre-release)
    digits, rest = re.fullmatch(r"v?(\d+(?:\.\d+)*)(.*)", version).groups()
    release = [int(d) for d in digits.split(".")]
    while release and release[-1] == 0:
        release.pop()
    return release, not re.match(r"[._-]?(a|b|c|rc|alpha|beta|pre|dev)", rest)


def check(path):
    for line in open(path, encoding="utf-8"):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line.startswith("-r "):
            check(line[3:].strip())
        elif line:
            name, wanted = re.fullmatch(r"([\w.-]+)\s*((?:[<>=!]=?\s*[\d.]+\s*,?\s*)*)", line).groups()
            found = key(metadata.version(name))
            for compare, version in re.findall(r"([<>=!]=?)\s*([\d.]+)", wanted):
                need(COMPARE[compare](found, key(version)))


for path in sys.argv[1:]:
    check(path)

# torch and torchvision must be one pair: a CPU torch beside the registry's torchvision fails at import.
try:
    torch, vision = metadata.version("torch"), metadata.version("torchvision")
except metadata.PackageNotFoundError:
    sys.exit(0)
need(torch.endswith("+cpu") == vision.endswith("+cpu"))
for line in metadata.requires("torchvision") or []:
    pair = re.match(r"torch\s*\(?==\s*([\d.]+)", line)
    need(not pair or key(pair[1])[0] == key(torch)[0])
PYTHON
}

# _setup_env_key PYTHON FILE...: one line per file, "python3.11 SHA256 FILE". The interpreter's version is part of
# it because packages are lost to a venv whose base Python moved on.
_setup_env_key() {
    "$1" -I -S -c '
import hashlib, sys
for path in sys.argv[1:]:
    digest = hashlib.sha256(open(path, "rb").read()).hexdigest()
    print("python%d.%d %s %s" % (*sys.version_info[:2], digest, path))' "${@:2}" 2>/dev/null
}

# _setup_env_ready VENV FILE...: were exactly these files installed there?
_setup_env_ready() {
    local wanted line
    [ -f "$1/.setup_env_stamp" ] || return 1
    wanted=$(_setup_env_key "$1/bin/python" "${@:2}") || return 1
    while IFS= read -r line; do
        grep -qxF -e "$line" "$1/.setup_env_stamp" || return 1
    done <<<"$wanted"
}

_setup_env_stamp() {
    _setup_env_key "$1/bin/python" "${@:2}" >"$1/.setup_env_stamp.new" &&
        mv -f "$1/.setup_env_stamp.new" "$1/.setup_env_stamp"
}

# _setup_env_install VENV INTERPRETER OPTION FILE...: makes the venv where it is missing and runs pip. OPTION goes
# to `venv`: --clear, --system-site-packages or nothing.
_setup_env_install() {
    local venv=$1 interpreter=$2 option=$3 file arguments=()
    shift 3
    if [ -e "$venv/pyvenv.cfg" ] && ! "$venv/bin/python" -c '' 2>/dev/null; then
        option=--clear # its base Python is gone, and its packages with it
    fi
    if [ "$option" = --clear ] || [ ! -e "$venv/pyvenv.cfg" ]; then
        if ! command -v "$interpreter" >/dev/null; then
            _setup_env_say "no $interpreter found: install Python 3.10 or newer, or set PYTHON to one"
            return 1
        elif ! "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            _setup_env_say "$interpreter is not Python 3.10 or newer: set PYTHON to one that is, as in" \
                "PYTHON=python3.11"
            return 1
        elif ! "$interpreter" -c 'import ensurepip, venv' 2>/dev/null; then
            _setup_env_say "$interpreter has no venv module: install it, as in apt install python3-venv"
            return 1
        elif ! "$interpreter" -m venv --without-pip ${option:+"$option"} "$venv" >&2; then
            _setup_env_say "cannot make $venv (see above): set VENV to a folder that can be written"
            return 1
        fi
    fi
    # A venv that borrows everything, or that somebody filled by hand, needs no pip.
    if [ ! -e "$venv/.setup_env_stamp" ] && _setup_env_has "$venv/bin/python" "$@"; then
        _setup_env_stamp "$venv" "$@"
        return
    fi

    _setup_env_say "installing $* into $venv (downloads several GB the first time)"
    rm -f "$venv/.setup_env_stamp"
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null &&
        ! "$venv/bin/python" -m ensurepip --default-pip >/dev/null; then
        _setup_env_say "cannot put pip into $venv (see above): install the venv module, as in" \
            "apt install python3-venv"
        return 1
    fi
    for file in "$@"; do arguments+=(-r "$file"); done
    if ! "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check "${arguments[@]}" >&2; then
        _setup_env_say "pip failed (see above): check the network and the free disk space, then run this again"
        return 1
    fi
    _setup_env_stamp "$venv" "$@"
}

# Prints the folder of the environment to switch to, nothing when `python` is right as it is. A subshell, so the
# caller keeps its folder, options and variables.
_setup_env() (
    set +eu +o noclobber
    unset CDPATH
    cd -- "$(dirname -- "${BASH_SOURCE[0]}")" || exit 1
    active=${VIRTUAL_ENV:-} venv=${VENV:-.venv} interpreter=${PYTHON:-python3} option='' said='' futile=0
    venv=${venv%/}
    [ "${venv#/}" != "$venv" ] || venv=$PWD/$venv
    files=(requirements.txt)
    [ "${SETUP_DEV:-}" != 1 ] || files+=(requirements-dev.txt)

    if [ "$active" ] && [ ! "$active" -ef "$venv" ] && _setup_env_has "$active/bin/python" "${files[@]}"; then
        printf '%s' "$active"
        exit
    elif [ "${CONDA_PREFIX:-}" ] && _setup_env_has python "${files[@]}"; then
        exit
    elif [ ! -e "$venv.lock" ] && _setup_env_ready "$venv" "${files[@]}"; then
        printf '%s' "$venv"
        exit
    elif [ -z "${VENV:-}" ] && [ ! -e "$venv" ]; then
        ! _setup_env_has python "${files[@]}" || exit 0
        # Only the name `python` or the test tools are missing: a venv that borrows the rest saves the download.
        [ "$active" ] || ! _setup_env_has "$interpreter" requirements.txt || option=--system-site-packages
    elif [ ! -e "$venv.lock" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ "$(ls -A "$venv" 2>/dev/null)" ]; then
        _setup_env_say "$venv exists and is no Python environment: set VENV to another folder"
        exit 1
    fi

    # One set-up at a time: the lock holds the id of its process. A lock whose process is gone is a set-up that was
    # cut off, perhaps with a package half written: start over.
    folder=$(dirname -- "$venv")
    mkdir -p -- "$folder" 2>/dev/null
    if [ ! -d "$folder" ] || [ ! -w "$folder" ]; then
        _setup_env_say "cannot write to $folder: set VENV to a folder that can be written"
        exit 1
    fi
    # shellcheck disable=SC2016 # the $PPID of that sh is this subshell
    until sh -c 'set -C; echo "$PPID" >"$1"' sh "$venv.lock" 2>/dev/null; do
        sleep 1 # also the time that a new lock may take to get its number
        owner=$(cat "$venv.lock" 2>/dev/null)
        if [ "$owner" ] && { [ -d "/proc/$owner" ] || kill -0 "$owner" 2>/dev/null; }; then
            [ "$said" ] || _setup_env_say "waiting for process $owner, which makes $venv (if it does not," \
                "delete $venv.lock)"
            said=yes
        elif [ $((futile += 1)) -gt 3 ]; then
            _setup_env_say "cannot write $venv.lock: is the disk full?"
            exit 1
        elif [ -e "$venv.lock" ]; then
            rm -f "$venv.lock"
            option=--clear
        fi
    done
    status=0
    if [ "$option" = --clear ] || ! _setup_env_ready "$venv" "${files[@]}"; then
        _setup_env_install "$venv" "$interpreter" "$option" "${files[@]}" || status=1
    fi
    rm -f "$venv.lock"
    [ "$status" != 0 ] || printf '%s' "$venv"
    exit "$status"
)

# A sourced script leaves nothing behind but the environment.
_setup_env_forget() {
    unset _setup_env_folder
    unset -f _setup_env_say _setup_env_has _setup_env_key _setup_env_ready _setup_env_stamp _setup_env_install \
        _setup_env _setup_env_forget
}

if _setup_env_folder=$(_setup_env); then
    if [ "$_setup_env_folder" ]; then
        if [ "${VIRTUAL_ENV:-}" != "$_setup_env_folder" ] && [ -f "$_setup_env_folder/bin/activate" ]; then
            # shellcheck source=/dev/null
            . "$_setup_env_folder/bin/activate"
        fi
        # A venv that was moved, or whose VIRTUAL_ENV outlived its PATH, does not get there by itself.
        if [ "$(command -v python)" != "$_setup_env_folder/bin/python" ]; then
            export VIRTUAL_ENV=$_setup_env_folder PATH=$_setup_env_folder/bin:$PATH
        fi
    fi
    _setup_env_forget
else
    _setup_env_forget
    # shellcheck disable=SC2317 # sourced, or run
    return 1 2>/dev/null || exit 1
fi
