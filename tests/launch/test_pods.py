"""The launchers, against stand-ins of the programs that they call."""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from safetydpo_jax.errors import UserError
from safetydpo_jax.pods import RESTART, parse_slice

ROOT = Path(__file__).parents[2]
JOB = ["--", "train", "--config", "hate", "--config.steps=3", "--workdir", "gs://b/it's"]

# Of gcloud, on a slice of two hosts, which are folders; a command on a host is run by bash.
GCLOUD = """#!/bin/bash
cd "$STAND_IN"; echo "$*" >>calls; last="${!#}"
hosts() { case "$*" in *--worker=all*) echo 0 1 ;; *) echo 0 ;; esac; }
case "$*" in
*queued-resources\\ create*) cat next 2>/dev/null >state || echo ACTIVE >state ;;
*queued-resources\\ list*) [ -s offline ] && sed -i 1d offline && exit 1
  cat state 2>/dev/null; exit 0 ;;
*queued-resources\\ delete*) rm -rf state host0 host1 ;;
*tpu-vm\\ scp*) for i in $(hosts "$@"); do cp "$5" "host$i/safetydpo/" || exit 1; done ;;
*tpu-vm\\ ssh*) [ -s broken ] && sed -i 1d broken && exit 255
  for i in $(hosts "$@"); do
    mkdir -p "host$i"; (cd "host$i"; HOME="$PWD" bash -c "$last") || code=$?
  done
  [ "$(cat state)" = ACTIVE ] || exit 255; exit ${code:-0} ;;
*) echo "unknown: $*" >&2; exit 9 ;;
esac
"""
# Of uv, which "installs" a safetydpo that ends as the next line of `ends` says.
UV = """#!/bin/bash
[ "$1" = pip ] || exit 0
[ -f "${!###*file://}" ] || exit 1
mkdir -p venv/bin; cp "$STAND_IN/safetydpo" venv/bin/
"""
SAFETYDPO = """#!/bin/bash
printf '%s|' "$@"; echo
case "$PWD" in *host1*) exit 0 ;; esac
end=$(head -n 1 "$STAND_IN/ends"); sed -i 1d "$STAND_IN/ends"
if [ "$end" = taken ]; then echo SUSPENDED >"$STAND_IN/state"; exit 0; fi
exit "$end"
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder whose programs are found before all others."""
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def write(name, text):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    return write


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tpu_vm(stand_in, tmp_path, monkeypatch, capfd):
    """Runs a job on a slice that stands in for one; `ends` are how its tries end."""
    stand_in("gcloud", GCLOUD)
    stand_in("uv", UV)
    stand_in("safetydpo", SAFETYDPO)
    module = script("tpu_vm")
    (tmp_path / "x.whl").write_text("")
    monkeypatch.setattr(module, "build", lambda shell, folder: tmp_path / "x.whl")
    monkeypatch.setattr(module, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(module, "WAITS", 2)

    def run(*ends, options=()):
        (tmp_path / "ends").write_text("".join(f"{end}\n" for end in ends))
        argv = ["tpu_vm.py", "--name", "hate", "--zone=us-west4-a", "--topology=v5e:4x4", *options]
        monkeypatch.setattr(sys, "argv", [*argv, *JOB])
        try:
            module.main()
        finally:
            calls = tmp_path / "calls"
            run.calls = calls.read_text() if calls.exists() else ""
        return capfd.readouterr().out

    run.module = vars(module)
    return run


def test_a_job_on_every_host(tpu_vm, tmp_path):
    said = tpu_vm(0, options=["--spot", "--project=mine"])
    words = "train|--config|hate|--config.steps=3|--workdir|gs://b/it's|--distributed|"
    assert said.count(f"\n{words}\n") == 1  # the first host's log
    assert (
        "queued-resources create hate --node-id hate --zone us-west4-a --project mine "
        "--accelerator-type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite --spot"
    ) in tpu_vm.calls
    assert tpu_vm.calls.splitlines()[-1].endswith(
        "queued-resources delete hate --zone us-west4-a --project mine --force --quiet"
    )
    assert not (tmp_path / "state").exists()


def test_a_slice_that_is_kept_is_used_again(tpu_vm, tmp_path):
    tpu_vm(0, options=["--keep"])
    assert (tmp_path / "host1/safetydpo/log").read_text().startswith("train|")
    tpu_vm(0)
    assert tpu_vm.calls.count("queued-resources create") == 1
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("end", [75, 134, 143, 137])
def test_a_lost_process(tpu_vm, end):
    said = tpu_vm(end, 0)
    assert f"exit code {end}: it is started again, 50 times more at the most" in said
    assert tpu_vm.calls.count("queued-resources create") == 1


def test_a_job_that_runs_is_looked_at_again(tpu_vm, tmp_path, capfd):
    """And neither stopped, nor installed anew, nor started twice."""
    home = tmp_path / "host0" / "safetydpo"
    home.mkdir(parents=True)
    (tmp_path / "state").write_text("ACTIVE\n")
    # Started by a shell that ends: a process that nobody waits for would still seem to run.
    job = "setsid bash -c 'echo going; sleep 4; echo 0 >exit' >log 2>&1 & echo $! >pid"
    subprocess.run(["bash", "-c", job], cwd=home, check=True)
    said = tpu_vm()
    assert "\ngoing\n" in said
    assert " scp " not in tpu_vm.calls


def test_a_job_that_ends_with_1(tpu_vm):
    with pytest.raises(UserError, match="the job ended with exit code 101"):
        tpu_vm(1)


def test_no_more_restarts(tpu_vm):
    with pytest.raises(UserError, match="the job ended with exit code 75"):
        tpu_vm(75, 75, 75, options=["--restarts=1"])


def test_restarts_that_are_no_number(tpu_vm, capfd):
    with pytest.raises(SystemExit):
        tpu_vm(options=["--restarts=-1"])
    assert "'-1' is no number of restarts, 0 or more" in capfd.readouterr().err


def test_a_slice_that_is_taken_away(tpu_vm):
    said = tpu_vm("taken", 0)
    assert "exit code 75: it is started again" in said
    assert tpu_vm.calls.count("queued-resources create") == 2


def test_a_connection_that_breaks(tpu_vm, tmp_path):
    """Neither is what runs there taken for dead, nor the slice for gone."""
    (tmp_path / "broken").write_text("x\n" * 3)
    (tmp_path / "offline").write_text("x\n" * 2)
    said = tpu_vm(0)
    assert "hate: no answer" in said
    assert said.count("the connection is lost; what runs there goes on") == 3
    assert tpu_vm.calls.count(" scp ") == tpu_vm.calls.count("queued-resources create") == 1


def test_no_connection_any_more(tpu_vm, tmp_path, monkeypatch):
    monkeypatch.setitem(tpu_vm.module, "TRIES", 2)
    (tmp_path / "broken").write_text("x\n" * 3)
    with pytest.raises(UserError, match="hate cannot be reached; the slice is kept, and costs"):
        tpu_vm(0)


def test_a_request_that_is_refused(tpu_vm, tmp_path):
    (tmp_path / "next").write_text("FAILED\n")
    with pytest.raises(UserError, match="the request failed 3 times, as without a quota"):
        tpu_vm(0)
    assert tpu_vm.calls.count("queued-resources create") == 3


def test_a_wrong_setting(tpu_vm, tmp_path):
    with pytest.raises(UserError, match="the job ended with exit code 2; what it says is above"):
        tpu_vm(2)
    assert not (tmp_path / "state").exists()


def test_gcloud_that_fails(tpu_vm, stand_in):
    stand_in("uv", "#!/bin/bash\nexit 7")
    with pytest.raises(UserError, match=r"gcloud failed \(7\), .* is kept, and costs: start this"):
        tpu_vm(0)


def test_a_dry_run_calls_nothing(tpu_vm, stand_in, tmp_path):
    (tmp_path / "gcloud").unlink()
    said = tpu_vm(options=["--dry-run"])
    lines = [line for line in said.splitlines() if line.startswith("$ gcloud")]
    assert [shlex.split(line.removeprefix("$ "))[4] for line in lines if line.endswith("quiet")]
    assert len([line for line in said.splitlines() if line.startswith("$ ")]) == 7


def run(name, *arguments):
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:4", *JOB], "--topology is 'v5e:4': give one of v5e, v5p, v6e with its"),
        (["--topology=v5p:4x4", *JOB], "--topology is 'v5p:4x4': give one"),
        (["--topology=v5e:3x3", *JOB], "9 chips fill no hosts"),
        (["--topology=v5e:4x4"], "say what to run after --, as -- train"),
        (["--topology=v5e:4x4", "--", "trian"], "(not 'trian'; there are train,"),
    ],
)
def test_wrong_commands(arguments, message):
    done = run("gke", "--name=x", "--image=x", "--dry-run", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "accelerator"),
    [
        ("v5e:2x2", 4, 1, "v5litepod-4"),
        ("v5e:2x4", 8, 1, "v5litepod-8"),
        ("v5e:16x16", 256, 64, "v5litepod-256"),
        ("v5p:4x4x8", 128, 32, "v5p-256"),
        ("v6e:16x16", 256, 64, "v6e-256"),
    ],
)
def test_slices(name, chips, hosts, accelerator):
    found = parse_slice(name)
    assert (found.chips, found.hosts, found.accelerator_type) == (chips, hosts, accelerator)


def test_a_job_set(stand_in, tmp_path):
    stand_in("kubectl", '#!/bin/bash\necho "$*" >"$STAND_IN/call"; cat >"$STAND_IN/sent"\n')
    options = ["--name=hate", "--image=repo/x", "--topology=v6e:4x8", "--restarts=3", "--spot"]
    shown = run("gke", *options, "--dry-run", *JOB)
    assert shown.returncode == 0, shown.stderr
    assert not (tmp_path / "sent").exists()
    done = run("gke", *options, *JOB)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "call").read_text() == "create --filename -\n"
    sent = (tmp_path / "sent").read_text()
    assert sent in shown.stdout
    found = yaml.safe_load(sent)
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 3
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["args"] == [*JOB[1:], "--distributed"]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (143, True)])
def test_a_batch_job(stand_in, tmp_path, code, requeued):
    stand_in("sbatch", '#!/bin/bash\ncat >"$STAND_IN/sent"\n')
    stand_in("srun", f'#!/bin/bash\nprintf \'%s|\' "$@" >"$STAND_IN/srun_call"; exit {code}\n')
    stand_in("scontrol", '#!/bin/bash\necho "$*" >"$STAND_IN/scontrol_call"\n')
    done = run("slurm", "--name=hate", "--nodes=2", "--gpus=4", "--time=1:00:00", *JOB)
    assert done.returncode == 0, done.stderr
    sent = (tmp_path / "sent").read_text()
    for option in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=1:00:00", "requeue"):
        assert f"\n#SBATCH --{option}\n" in sent
    job = subprocess.run(
        ["bash"], input=sent, text=True, check=False, env=os.environ | {"SLURM_JOB_ID": "17"}
    )
    assert job.returncode == code
    called = (tmp_path / "srun_call").read_text()
    assert called.startswith("--kill-on-bad-exit=0|--cpus-per-task=8|")
    assert called.endswith("|-m|safetydpo_jax|" + "|".join([*JOB[1:], "--distributed"]) + "|")
    calls = tmp_path / "scontrol_call"
    assert (calls.read_text() == "requeue 17\n") if requeued else not calls.exists()


@pytest.mark.parametrize(
    ("name", "options"), [("slurm", []), ("gke", ["--image=x", "--topology=v5e:2x2"])]
)
def test_without_the_program(name, options, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run(name, "--name=x", *options, *JOB)
    program = {"slurm": "sbatch", "gke": "kubectl"}[name]
    assert done.stderr == f"error: {program} is not installed here: see docs/pods.md\n"


def test_skypilots_file(stand_in, tmp_path):
    task = yaml.safe_load((ROOT / "launch/sky.yaml").read_text())
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)
    (tmp_path / "venv/bin").mkdir(parents=True)
    stand_in("venv/bin/safetydpo", "#!/bin/bash\nprintf '%s|' \"$@\"; env | grep ^JAX_\n")
    given = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], **task["envs"]}
    nodes = {"NODE_IPS": "10.0.0.1\n10.0.0.2", "NUM_NODES": "2", "NODE_RANK": "1"}
    given |= {f"SKYPILOT_{name}": value for name, value in nodes.items()}

    def said_by(**more):
        command, env = ["bash", "-euc", task["run"]], given | more
        return subprocess.run(command, env=env, text=True, check=True, capture_output=True).stdout

    said = said_by()
    assert said.startswith("train|--config|hate|--distributed|--workdir|runs/hate|")
    assert said_by(COMMAND="cache --x").startswith("cache|--x|--workdir|runs/hate|")
    assert said_by(COMMAND="merge --x").startswith("merge|--x|JAX_")
    for line in ("COORDINATOR_ADDRESS=10.0.0.1:8476", "NUM_PROCESSES=2", "PROCESS_ID=1"):
        assert f"JAX_{line}\n" in said
    assert set(task["resources"]["job_recovery"]["recover_on_exit_codes"]) == set(RESTART)


def test_the_image_has_what_it_copies():
    words = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines()]
    sources = [word for line in words if line[:1] == ["COPY"] for word in line[1:-1]]
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert sources[-1] == "."
    for source in sources[:-1]:
        assert (ROOT / source).exists()
        assert source.split("/")[0] in kept
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{name}"' in pyproject or (ROOT / name).is_file() for name in kept)
