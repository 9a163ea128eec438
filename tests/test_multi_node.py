"""Two torchrun agents that meet on this machine's loopback, as two machines would: one stage on each."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers.workspace import TIME_LIMIT_SECONDS, Workspace, environment, make_workspace
from tests.test_train import free_port, losses

STEPS = ("max_steps=3", "adapter.dropout=0.2")


def launch_nodes(workspace: Workspace, places: list[Path], *overrides: str) -> list[tuple[int, str]]:
    """One agent per working directory; each one's status and what it said."""
    port, agents = free_port(), []
    for number, place in enumerate(places):
        launcher = ["torchrun", "--nnodes", str(len(places)), "--nproc_per_node", "1"]
        launcher += ["--node_rank", str(number), "--rdzv_id", "shapes", "--rdzv_backend", "c10d"]
        launcher += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1"]
        command = workspace.command(
            launcher, "dit_lora", *STEPS, f"pipeline_stages={len(places)}", *overrides
        )
        with (workspace.root / f"node{number}").open("w") as said:
            agents.append(subprocess.Popen(command, cwd=place, env=environment(), stdout=said, stderr=said))
    try:
        codes = [agent.wait(timeout=TIME_LIMIT_SECONDS) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [(code, (workspace.root / f"node{number}").read_text()) for number, code in enumerate(codes)]


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, tiny_ti2v, tiny_dataset)


@pytest.mark.long
def test_two_nodes_train_as_one_process_does(workspace: Workspace) -> None:
    said = launch_nodes(workspace, [workspace.root, workspace.root])
    assert [code for code, _ in said] == [0, 0], said
    together = "".join(text for _, text in said)
    assert together.count("run directory: ") == 1 and "2 stage(s) x 1 data-parallel" in together
    (run,) = workspace.runs()
    assert workspace.train("dit_lora", *STEPS) == 0
    (alone,) = [path for path in workspace.runs() if path != run]
    assert losses(run) == losses(alone) and len(losses(run)) == 3
    assert {path.name for path in (run / "global_step3").iterdir()} >= {"stage_0.json", "stage_1.json"}
    assert not workspace.leftovers()


@pytest.mark.long
def test_a_run_directory_that_is_not_shared_is_refused(workspace: Workspace) -> None:
    """The same relative path on two machines that share only their cache."""
    places = [workspace.root / "a", workspace.root / "b"]
    for place in places:
        place.mkdir()
    said = launch_nodes(workspace, places, "output_dir=out")
    together = "".join(text for _, text in said)
    assert all(code != 0 for code, _ in said), together
    assert together.count("error: ") - together.count("torch.distributed.elastic") <= 1
    message = "process 1 on "
    assert message in together or "process 0 on " in together, together
    assert "does not see what process 0 has written into the run directory" in together
    assert "docs/multi_node.md" in together and not list(workspace.root.glob("*/out/*/metrics.jsonl"))
