#!/usr/bin/env bash
# Creates the environment in which pow2quant runs from this checkout, or updates it; --help says how.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'HELP'
usage: scripts/create_env.sh [--tool TOOL] [--name NAME] [--cpu] [--no-aimet] [--dry-run]

Creates an environment with pow2quant in it, or updates the one that is there, and quantizes a small network in it to
show that it works.

  --tool TOOL   conda, mamba, micromamba, uv or venv (default: the first of these that is installed)
  --name NAME   conda, mamba, micromamba: the environment's name (default: the one in environment.yml)
                uv, venv: its folder, absolute or relative to the checkout (default: .venv)
  --cpu         PyTorch's builds without CUDA: several gigabytes less (from PyTorch's own index, found by uv)
  --no-aimet    leave out AIMET: no `--backend aimet`
  --dry-run     print the commands, change nothing
  --help        print this

example: scripts/create_env.sh --tool venv --name .venv --no-aimet
HELP
}

# A bad argument: one line, exit status 2.
die() {
    printf 'create_env.sh: %s\n' "$1" >&2
    exit 2
}

# Prints a command, and runs it unless this is a dry run.
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    "$dry_run" || "$@"
}

# Runs a program of the new environment.
inside() {
    case $tool in
        conda) run conda run --no-capture-output --name "$name" "$@" ;;
        mamba | micromamba) run "$tool" run --name "$name" "$@" ;;
        *) run "$name/bin/$1" "${@:2}" ;;
    esac
}

works() { "$1" --version >/dev/null 2>&1; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' >/dev/null 2>&1; }

# Channels and packages of environment.yml become the arguments of `create` and `install`, which all conda tools share.
create_conda() {
    local section="" mark word arguments=(--yes --name "$name" --override-channels) action=create
    while read -r mark word; do
        case $mark$word in
            channels: | dependencies:) section=$mark ;;
            -pip:) break ;;
            -*) if [[ $section == channels: ]]; then arguments+=(--channel "$word"); else arguments+=("$word"); fi ;;
        esac
    done <environment.yml
    while read -r word _; do
        if [[ $word == "$name" ]]; then action=install; fi
    done < <("$tool" env list)
    run "$tool" "$action" "${arguments[@]}"
}

create_folder() {
    # venv writes bin/activate last; the Makefile takes an environment that has it for its own.
    if [[ -e $name/pyvenv.cfg && -e $name/bin/activate ]] && supported "$name/bin/python"; then
        return
    elif [[ -e $name ]]; then
        die "$name exists and is no complete environment of Python 3.10 to 3.13; remove it, or choose another --name"
    elif [[ $tool == uv ]]; then
        run uv venv --seed --prompt pow2quant --python '>=3.10,<3.14' "$name"
    else
        local python
        for python in python3 python3.13 python3.12 python3.11 python3.10 ""; do
            if supported "$python"; then break; fi
        done
        [[ $python ]] || die "venv needs Python 3.10 to 3.13 on the PATH; uv would fetch one"
        run "$python" -m venv --prompt pow2quant "$name"
    fi
}

# A CPU build satisfies the same requirement as a CUDA build, so --cpu has to reinstall the two packages that differ.
install() {
    local cpu_builds=(--torch-backend cpu --reinstall-package torch --reinstall-package torchvision)
    local options=(--constraint constraints.txt --editable ".$extra")
    if "$cpu"; then options=("${cpu_builds[@]}" "${options[@]}"); fi
    case $tool-$cpu in
        uv-*) run uv pip install --compile-bytecode --python "$name/bin/python" "${options[@]}" ;;
        *-false) inside python -m pip install --disable-pip-version-check "${options[@]}" ;;
        *-true)
            inside python -m pip install --disable-pip-version-check uv
            if [[ $tool == venv ]]; then
                inside uv pip install --compile-bytecode --python "$name/bin/python" "${options[@]}"
            else # --system is the first Python on the PATH: under `run`, the environment's
                inside uv pip install --compile-bytecode --system "${options[@]}"
            fi
            ;;
    esac
}

smoke_test() {
    local folder=TEMPORARY
    if ! "$dry_run"; then
        folder=$(mktemp -d)
        # shellcheck disable=SC2064  # the folder's name is needed now: it is local
        trap "rm -rf $(printf %q "$folder")" EXIT
    fi
    if [[ $extra ]]; then inside python -c 'import aimet_torch'; fi
    OMP_NUM_THREADS=1 inside pow2quant ptq --output "$folder/run"
}

tool="" name="" extra="[aimet]" cpu=false dry_run=false
while (($#)); do
    case $1 in
        --tool | --name)
            [[ ${2:-} && ${2:-} != -* ]] || die "$1 needs a value"
            if [[ $1 == --tool ]]; then tool=$2; else name=$2; fi
            shift
            ;;
        --tool=?*) tool=${1#*=} ;;
        --name=?*) name=${1#*=} ;;
        --cpu) cpu=true ;;
        --no-aimet) extra="" ;;
        --dry-run) dry_run=true ;;
        --help | -h)
            usage
            exit
            ;;
        *) die "unknown argument $1; legal are --tool, --name, --cpu, --no-aimet, --dry-run, --help" ;;
    esac
    shift
done

case $tool in
    "")
        for tool in conda mamba micromamba uv venv; do
            if works "$tool"; then break; fi # none of them works: venv, which is a part of Python
        done
        ;;
    conda | mamba | micromamba | uv) works "$tool" || die "$tool is not installed" ;;
    venv) ;;
    *) die "unknown tool $tool; legal are conda, mamba, micromamba, uv, venv" ;;
esac

# What the caller's shell brings along must not be taken for a part of the environment.
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV
export PYTHONNOUSERSITE=1

case $tool in
    uv | venv)
        name=${name:-.venv}
        create_folder
        [[ $name == /* ]] || name=$PWD/$name
        printf -v activate 'source %q' "$name/bin/activate"
        ;;
    *)
        while read -r key value; do
            if [[ $key == name: ]]; then name=${name:-$value}; fi
        done <environment.yml
        create_conda
        printf -v activate '%s activate %q' "$tool" "$name"
        ;;
esac
install
smoke_test
if "$dry_run"; then verdict="Nothing was changed."; else verdict="The environment is there."; fi
printf '\n%s To enter it:\n%s\n' "$verdict" "$activate"
