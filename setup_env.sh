#!/usr/bin/env bash
# Makes sure that `python` has what requirements.txt asks for. Run it, or source it to have that `python`:
#
#     source setup_env.sh                 what a run needs
#     SETUP_DEV=1 source setup_env.sh     what the tests need as well (requirements-dev.txt)
#
# An active environment (VIRTUAL_ENV) that has everything is used as it is. Otherwise it is $VENV, by default .venv
# next to this script (a relative path counts from here): made with $PYTHON (default python3) where it is missing,
# and filled once. A stamp inside tells which requirement files it has; when they change, pip runs again.

_setup_env() ( # prints the folder of the environment; a subshell, so the caller's folder and options are unchanged
    fail() { echo "setup_env.sh: $*" >&2; exit 1; }
    has() { # has PYTHON: are the requirements met? Reads metadata only; what it cannot read counts as missing.
        "$1" - "${files[@]}" <<'PY' 2>/dev/null
import sys
from importlib.metadata import requires, version
try:
    from pip._vendor.packaging.requirements import Requirement
except ImportError:  # uv makes environments without pip
    from packaging.requirements import Requirement

lines = [line.split("#")[0].strip() for path in sys.argv[1:] for line in open(path, encoding="utf-8")]
wanted = [Requirement(line) for line in lines if line not in ("", "-r requirements.txt")]
if "torchvision" in [r.name for r in wanted]:  # must be built for this torch, or it fails at import
    wanted += [r for r in map(Requirement, requires("torchvision") or []) if r.name == "torch"]
    if version("torchvision").endswith("+cpu") != version("torch").endswith("+cpu"):
        sys.exit(1)
for r in wanted:
    if (not r.marker or r.marker.evaluate()) and not r.specifier.contains(version(r.name), prereleases=True):
        sys.exit(1)
PY
    }

    CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" || exit 1
    venv=${VENV:-.venv} python=${PYTHON:-python3} clear='' files=(requirements.txt)
    [ "${SETUP_DEV:-}" != 1 ] || files+=(requirements-dev.txt)
    [ "${venv#/}" != "$venv" ] || venv=$PWD/$venv
    stamp=$venv/.setup_env_stamp

    if [ "${VIRTUAL_ENV:-}" ] && [ ! "$VIRTUAL_ENV" -ef "$venv" ] && has "$VIRTUAL_ENV/bin/python"; then
        printf '%s' "$VIRTUAL_ENV" && exit
    fi
    if ! "$venv/bin/python" -c '' 2>/dev/null; then # missing, or the Python that it was made with was removed
        command -v "$python" >/dev/null || fail "no $python found: install Python 3.10 or newer, or set PYTHON to one"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            fail "$python does not start or is older than 3.10: set PYTHON to a newer one, as in PYTHON=python3.11"
        "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module: apt install python3-venv"
        [ ! -e "$venv/pyvenv.cfg" ] || clear=--clear
        "$python" -m venv $clear "$venv" >&2 || fail "cannot make $venv (see above): set VENV to another folder"
    fi
    # Ready when each file's line is in the stamp: that of SETUP_DEV=1 serves a plain call too.
    if [ ! -f "$stamp" ] || cksum "${files[@]}" | grep -vxFf "$stamp" >/dev/null; then
        if ! has "$venv/bin/python"; then
            echo "setup_env.sh: installing ${files[*]} into $venv (downloads several GB the first time)" >&2
            rm -f "$stamp"
            "$venv/bin/python" -c 'import pip' 2>/dev/null || "$venv/bin/python" -m ensurepip --default-pip >/dev/null
            "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check "${files[@]/#/-r}" >&2 ||
                fail "pip failed (see above): check the network and the free disk space, then run this again"
        fi
        cksum "${files[@]}" >|"$stamp"
    fi
    printf '%s' "$venv"
)

_setup_env_folder=$(_setup_env) || _setup_env_folder=
unset -f _setup_env
if [ ! "$_setup_env_folder" ]; then
    unset _setup_env_folder
    # shellcheck disable=SC2317 # sourced, or run
    return 1 2>/dev/null || exit 1
elif [ "$(command -v python)" != "$_setup_env_folder/bin/python" ]; then
    export VIRTUAL_ENV=$_setup_env_folder PATH=$_setup_env_folder/bin:$PATH
fi
unset _setup_env_folder
