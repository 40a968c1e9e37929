"""Several processes (torchrun, gloo) do what one does: the same rollouts, the same gradient, one log."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import FULL, ROOT
from judge_server import JudgeServer
from safetensors.torch import load_file, save_file
from test_survival import same_run
from test_train import lines

import grpo
import train

pytestmark = pytest.mark.long  # runs of whole processes take minutes: pytest --long

FLAGS = ["--steps", "4", "--prompts_per_step", "3", "--group_size", "4", "--max_new_tokens", "24", "--eval_every", "2", "--save_every", "2", "--prompts", "6", "--lr", "0.01", "--judge", "lexical"]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(world, *flags, script=ROOT / "train.py"):
    """The command that starts a script in several processes."""
    rendezvous = ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), *rendezvous]
    return [*command, str(script), *map(str, flags)]


def together(world, *flags, script=ROOT / "train.py", timeout=600):
    """A script under torchrun; its status and words."""
    command = torchrun(world, *flags, script=script)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_all(process)
            raise
    return process.returncode, printed + errors


def children(parent):
    """The processes that this one has started: torchrun puts each into a session of its own."""
    numbers = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(number) for number in numbers]


def kill_all(process):
    """SIGKILL for torchrun and what it has started."""
    for number in [process.pid, *children(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def close(a, b, path=""):
    """Equal JSON values, floats up to 5e-5 (relative above 1): sums in another order, divided by AdamW."""
    if isinstance(a, float) or isinstance(b, float):
        assert a == pytest.approx(b, abs=5e-5, rel=5e-5), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            close(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b)):
            close(x, y, f"{path}/{k}")
    else:
        assert a == b, path


@pytest.mark.parametrize(
    "method",
    [
        "--method points --loss dapo --advantage mean",
        "--method rler --epochs 2 --minibatches 2 --beta 0.1",
        "--method arlrr --schedule search --stage 2 --validation 3 --loss grpo",
        "--method gdpo",
    ],
)
def test_two_processes_are_one(tiny, few, forms, tmp_path, method):
    flags = ["--model", str(tiny), "--data", forms, "--eval_data", few, *FLAGS, *method.split()]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main([*flags, "--out", str(one)]) == 0
    status, printed = together(2, *flags, "--out", two)
    assert status == 0, printed
    assert printed.count("held-out score before training") == 1  # one of them speaks
    close(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"))
    close(lines(one / "samples.jsonl"), lines(two / "samples.jsonl"))
    a, b = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for key in a:  # after AdamW, which divides by the gradient's size
        assert float((a[key] - b[key]).abs().max()) < 2e-4


def test_another_number_of_processes_continues(tiny, few, forms, tmp_path):
    """2 -> 1 -> 2: the checkpoint of a shared policy is a whole one. Up to rounding it is the run of one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--model", str(tiny), "--data", forms, "--eval_data", few, *FLAGS, "--method", "rler", "--steps", "6"]
    assert train.main([*flags, "--out", str(one)]) == 0
    status, printed = together(2, *flags, "--steps", "2", "--out", two)
    assert status == 0, printed
    assert json.loads((two / "config.json").read_text())["steps"] == 2
    assert train.main(["--resume", str(two), "--steps", "4"]) == 0
    assert [row["step"] for row in lines(two / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    status, printed = together(2, "--resume", two, "--steps", "6")
    assert status == 0, printed

    def texts(folder):
        return [(row["step"], row["split"], row["text"]) for row in lines(folder / "samples.jsonl")]

    assert texts(one)[-1][0] == 6
    # An evaluation more, where a part of the run ended.
    rows = {row["step"]: row for row in lines(two / "metrics.jsonl")}
    assert set(texts(one)) <= set(texts(two))
    for row in lines(one / "metrics.jsonl"):
        close(row, {key: rows[row["step"]][key] for key in row})
    a, b = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (one, two))
    for key in a:
        assert float((a[key] - b[key]).abs().max()) < 2e-4


def test_a_checkpoint_that_cannot_be_written_ends_all_of_them(tiny, few, forms, tmp_path):
    """The first one writes, after all have gathered: its error is that of all, and the last checkpoint stays."""
    flags = ["--model", tiny, "--data", forms, "--eval_data", few, *FLAGS, "--out", tmp_path / "run"]
    # A limit on file size stands for the full disk: below the weights (110 kB), above the logs so far.
    limited = ["bash", "-c", 'ulimit -f 80; exec "$@"', "bash", *torchrun(2, *flags)]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode != 0 and "cannot be written" in printed, printed
    assert len({line for line in printed.split("\n") if line.startswith("train.py: ")}) == 1  # the error of one is that of all
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_more_processes_than_prompts(tiny, few, forms, tmp_path):
    """A process without a prompt still takes part in every sum."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--model", str(tiny), "--data", forms, "--eval_data", few, *FLAGS, "--prompts_per_step", "1", "--steps", "2"]
    assert train.main([*flags, "--out", str(one)]) == 0
    status, printed = together(2, *flags, "--out", two)
    assert status == 0, printed
    close(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"))


@pytest.mark.long
@pytest.mark.parametrize("method", ["rler", "arlrr"])
def test_two_processes_that_are_killed_are_the_same_run(tiny, few, forms, tmp_path, method):
    """Four SIGKILLs of both (28 with FULL_COUNTS), at moments drawn over a run; then every bit is as it would have been."""
    flags = ["--model", str(tiny), "--data", forms, "--eval_data", few, *FLAGS, "--method", method, "--validation", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    started = time.time()
    status, printed = together(2, *flags, "--out", whole)
    assert status == 0, printed
    duration = time.time() - started
    rng = random.Random(method)
    for _ in range(28 if FULL else 4):
        arguments = ["--resume", cut] if (cut / "config.json").exists() else [*flags, "--out", cut]
        with open(tmp_path / "log", "a") as log:
            process = subprocess.Popen(torchrun(2, *arguments), env=ENVIRONMENT, start_new_session=True, stdout=log, stderr=log)
            try:
                process.wait(timeout=rng.uniform(0.4, 1.0) * duration)
            except subprocess.TimeoutExpired:
                kill_all(process)
    arguments = ["--resume", cut] if (cut / "config.json").exists() else [*flags, "--out", cut]
    status, printed = together(2, *arguments)
    assert status == 0, printed
    same_run(whole, cut)


def test_an_error_ends_all_of_them_with_one_line(tiny, tmp_path):
    status, printed = together(2, "--model", tiny, "--data", tmp_path / "nothing.jsonl", "--out", tmp_path / "run")
    assert status != 0 and "nothing.jsonl: no such file" in printed
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_judge_ends_all_of_them_at_once(tiny, few, forms, tmp_path):
    """Only the first one asks it; without the others' knowledge they would wait for hours."""
    with JudgeServer(status=404) as server:
        flags = ["--model", tiny, "--data", forms, "--eval_data", few, *FLAGS, "--judge", server.url, "--judge_model", "m"]
        status, printed = together(2, *flags, "--out", tmp_path / "run")
    assert status != 0 and "404" in printed
    # All have the same error. The first one prints it; on a loaded machine the others come to it as well.
    assert len({line for line in printed.split("\n") if line.startswith("train.py: ")}) == 1


def test_asked_to_stop_all_of_them_finish_the_step_and_the_first_one_saves(tiny, few, forms, tmp_path):
    """torchrun ends all when one has ended: the others wait for the save."""
    flags = ["--model", tiny, "--data", forms, "--eval_data", few, *FLAGS, "--steps", "400", "--save_every", "1000", "--eval_every", "1"]
    process = subprocess.Popen(torchrun(2, *flags, "--out", tmp_path / "run"), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or len(log.read_text().split("\n")) < 4:
        time.sleep(0.1)
        assert process.poll() is None, process.stdout.read()
    process.terminate()
    printed = process.communicate(timeout=120)[0]
    assert "stopped; continue with" in printed
    step = lines(log)[-1]["step"]
    assert (tmp_path / "run" / "checkpoint").resolve().name == f"checkpoint-{step}"
    assert not list((tmp_path / "run").glob("*.tmp"))


def one_update(tiny: str, loss: str) -> dict:
    """The weights after an update by plain gradient descent in float64.

    The groups are of uneven lengths, and one of them is without spread.
    """
    import torch
    from test_grpo import settings
    from transformers import AutoModelForCausalLM

    rng = random.Random(0)
    groups = []
    for number in range(5):
        prompt = [rng.randrange(2, 200) for _ in range(5 + number)]
        group = []
        for _ in range(3):
            ids = [rng.randrange(2, 200) for _ in range(rng.randint(1, 12))]
            rollout = grpo.Rollout(prompt, ids, [-1.0] * len(ids), "stop")
            if number != 1:
                rollout.advantage = rng.gauss(0, 1)
            group.append(rollout)
        groups.append(group)

    # Unscaled gradients: the sums themselves are compared.
    grpo.MAX_GRAD_NORM = 1e9
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = settings(loss=loss, max_new_tokens=12, epochs=2, minibatches=2, beta=0.1)
    grpo.update(model, optimizer, groups, config, grpo.freeze(model))

    state = {}
    for name, tensor in model.state_dict().items():
        if "lm_head" not in name:  # tied to the embedding
            state[name] = tensor.clone()
    return state


LEAVES = """
import atexit, sys
sys.path.insert(0, sys.argv[1])
import train
atexit.register(print, "Python ended")
train.join_processes()
print("came")
train.leave(0)
print("alone")
"""


def test_a_process_of_several_leaves_without_pythons_end(tmp_path):
    """In Python's end a thread of gloo may abort a run that succeeded; what was printed arrives all the same."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    status, said = together(2, ROOT, script=script)
    assert status == 0, said
    assert said.count("came") == 2
    assert "alone" not in said and "Python ended" not in said
    alone = subprocess.run([sys.executable, script, ROOT], capture_output=True, text=True, timeout=120, check=True)
    assert alone.stdout.split("\n") == ["came", "alone", "Python ended", ""]


JUDGES_ON = """
import atexit, sys, threading
sys.path.insert(0, sys.argv[1])
import torch
import train
atexit.register(print, "Python ended")
def judge():
    while True:
        torch.ones(100, 100).sum()
threading.Thread(target=judge, name=train.JUDGING, daemon=True).start()
print("came")
train.leave(2)
"""


def test_a_judge_that_works_on_does_not_abort_the_end(tmp_path):
    """A thread that comes back from C++ while Python is ending aborts the process: status 134 in place of 2."""
    script = tmp_path / "judges_on.py"
    script.write_text(JUDGES_ON)
    done = subprocess.run([sys.executable, script, ROOT], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "came\n", "")


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_the_sum_of_the_gradients_is_exact(tiny, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(grpo, "MAX_GRAD_NORM", grpo.MAX_GRAD_NORM)  # restored after one_update
    status, said = together(2, tiny, loss, tmp_path / "two.safetensors", script=__file__)
    assert status == 0, said
    one = one_update(str(tiny), loss)
    two = load_file(tmp_path / "two.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-10


if __name__ == "__main__":  # a process of torchrun
    import torch.distributed as dist

    dist.init_process_group("gloo")
    weights = one_update(sys.argv[1], sys.argv[2])
    if dist.get_rank() == 0:
        save_file(weights, sys.argv[3])
    train.leave(0)
