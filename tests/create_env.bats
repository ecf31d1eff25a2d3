#!/usr/bin/env bats
# The calls of scripts/create_env.sh, seen by stand-ins on a PATH that has nothing else: no solving, no installing.
# bats tests/create_env.bats

setup() {
    script=$BATS_TEST_DIRNAME/../scripts/create_env.sh
    bash=$(command -v bash)
    export CALLS=$BATS_TEST_TMPDIR/calls
    bin=$BATS_TEST_TMPDIR/bin
    mkdir "$bin"
    touch "$CALLS"
    local program
    for program in dirname mktemp rm cat; do ln -s "$(command -v "$program")" "$bin/$program"; done
}

# A tool that writes down how it is called. KNOWN: an environment that it has; FAIL: what it fails at.
stand_in() {
    cat >"$bin/$1" <<TOOL
#!$bash
case "\$*" in
    --version) ;;
    "env list") echo "\${KNOWN:-base}  /opt/envs/it" ;;
    *) echo "$1 \$*" >>"\$CALLS"; [[ -z \${FAIL:-} || "\$*" != *\$FAIL* ]] || exit 7 ;;
esac
TOOL
    chmod +x "$bin/$1"
}

create_env() { PATH=$bin run "$bash" "$script" "$@"; }

@test "the calls: conda creates, installs, checks AIMET and quantizes, in this order, and never activates" {
    stand_in conda
    create_env
    [ "$status" -eq 0 ]
    mapfile -t calls <"$CALLS"
    [ "${#calls[@]}" -eq 4 ]
    [[ ${calls[0]} == "conda create --yes --name pow2quant --override-channels --channel conda-forge python=3.12 pip" ]]
    [[ ${calls[1]} == "conda run --no-capture-output --name pow2quant python -m pip install "*"--editable .[aimet]" ]]
    [[ ${calls[2]} == *"import aimet_torch" ]]
    [[ ${calls[3]} == *"pow2quant ptq --output "* ]]
    [ "${lines[-1]}" = "conda activate pow2quant" ]
}

@test "the calls: a second run installs into the environment that is there" {
    stand_in micromamba
    KNOWN=mine create_env --tool micromamba --name mine --no-aimet
    [ "$status" -eq 0 ]
    mapfile -t calls <"$CALLS"
    [ "${#calls[@]}" -eq 3 ]
    [[ ${calls[0]} == "micromamba install --yes --name mine "* ]]
    [[ ${calls[1]} == *"--editable ." ]]
}

@test "the calls: mamba goes before micromamba, conda before both" {
    stand_in micromamba
    create_env --dry-run
    [[ ${lines[0]} == "+ micromamba create "* ]]
    stand_in mamba
    create_env --dry-run
    [[ ${lines[0]} == "+ mamba create "* ]]
    stand_in conda
    create_env --dry-run
    [[ ${lines[0]} == "+ conda create "* ]]
}

@test "the calls: --cpu lets uv choose PyTorch's CPU builds" {
    stand_in conda
    create_env --cpu
    [ "$status" -eq 0 ]
    grep -q "uv pip install .*--torch-backend cpu --reinstall-package torch --reinstall-package torchvision" "$CALLS"
}

@test "--dry-run calls nothing" {
    stand_in conda
    create_env --dry-run --cpu
    [ "$status" -eq 0 ]
    [ ! -s "$CALLS" ]
    [[ $output == *"Nothing was changed."* ]]
}

@test "a step that fails is the last one, and its status is the script's" {
    stand_in conda
    FAIL=" pip install" create_env
    [ "$status" -eq 7 ]
    [ "$(wc -l <"$CALLS")" -eq 2 ]
    [[ $output != *activate* ]]
}

@test "a bad argument is one line and status 2" {
    local argument
    for argument in --gpu --tool --tool=poetry --tool=mamba --name; do
        create_env "$argument"
        [ "$status" -eq 2 ]
        [ "${#lines[@]}" -eq 1 ]
        [[ ${lines[0]} == "create_env.sh: "* ]]
    done
    [ ! -s "$CALLS" ]
}

@test "--help names every flag and tool" {
    create_env --help
    [ "$status" -eq 0 ]
    local word
    for word in --tool --name --cpu --no-aimet --dry-run conda mamba micromamba uv venv; do [[ $output == *$word* ]]; done
}
