"""One rank of a test run: `python -m tests.trainers.train_rank TINY OUT CASE…`; rank 0 writes what each step did.

A case is NAME:METHOD:LOSS:BUDGET[:from=FOLDER][:lora][:fsdp][:bf16][:full][:short[=all]][:late[=all]]; its numbers go
to OUT/NAME.pt: loss and gradient norm of every step, the gradient before clipping and the weights, each as one flat
vector, and the ranks' budgets. Where BUDGET is auto, LEAST tokens fit anywhere; `full`: rank 1's machine has no memory
left; `short`: rank 1 (or each) runs out of memory in the middle of a forward pass over more than twice as many; `late`:
in the sixth step, whatever it computes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from entrypoint import host
from entrypoint.command import explain
from entrypoint.conf import Dpo, Grpo
from entrypoint.errors import RunError
from entrypoint.launch.topology import free_port
from entrypoint.launch.verdict import leave
from entrypoint.save import full_state
from entrypoint.training import memory
from entrypoint.world import World, joined
from tests.process import ROOT, scrubbed
from tests.trainers.builders import make_run, make_trainer
from tests.trainers.fsdp_on_cpu import allow_fsdp_on_cpu
from tests.trainers.sample_groups import ragged_groups

STEPS = 8
LEAST = 40  # tokens
AVAILABLE = host.available


def run_ranks(world: int, tiny: Path, out: Path, cases: Sequence[str]) -> list[tuple[int, str]]:
    """`world` processes of this module, waited for: each one's exit code and what it said."""
    meet = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainers.train_rank", str(tiny), str(out), *cases],
            env=scrubbed({"RANK": str(rank), "LOCAL_RANK": str(rank), **meet}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    said = [rank.communicate(timeout=900)[0] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([whole(t.detach()).reshape(-1).clone() for t in tensors])


def train(case: str, tiny: Path, out: Path, world: World) -> None:
    name, method, loss, budget, *options = case.split(":")
    given = dict(o.split("=") for o in options if "=" in o)
    folder = out / f"{name}-{world.size}"
    if "from" in given and world.is_main:
        shutil.copytree(given["from"], folder / Path(given["from"]).name)
    kind: Any = Grpo(loss_type=loss) if method == "grpo" else Dpo(loss_type=loss)
    sharding = "fsdp" if "fsdp" in options else "none"
    precision = "bf16" if "bf16" in options else "fp32"
    run = make_run(
        kind,
        folder,
        lora="lora" in options,
        max_steps=STEPS,
        micro_batch_tokens=budget if budget == "auto" else int(budget),
        sharding=sharding,
        precision=precision,
    )
    trainer, plan = make_trainer(run, tiny, ragged_groups(13, logged=method == "grpo"), world=world)
    host.available = (lambda: 0) if "full" in options and world.rank else AVAILABLE
    hooks = {"short": run_out, "late": lambda layer, *_: run_out_in(layer, trainer.state.global_step)}
    for option, hook in hooks.items():
        if given.get(option) == "all" or (option in options and world.rank == world.size - 1):
            trainer.model.get_submodule("model.layers.1").register_forward_pre_hook(hook, with_kwargs=True)
    gradients: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    clip = trainer._clip_grad_norm

    def spy(model: Any) -> Any:
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients.append(flat([p.grad for p in parameters]))
        weights.append(flat(parameters))
        return clip(model)

    trainer._clip_grad_norm = spy
    world.barrier()
    newest = world.once(lambda: str(path) if (path := trainer._checkpoints.find("auto")) else None)
    trainer.train(resume_from_checkpoint=newest)
    trainer._checkpoints.wait()
    weights.append(flat([p for p in trainer.model_wrapped.parameters() if p.requires_grad]))
    if "fsdp" in options:
        gathered = full_state(SimpleNamespace(trainer=trainer))  # type: ignore[arg-type]
        if world.is_main:
            names = [name for name, _ in trainer.model_wrapped.named_parameters()]
            assert gathered is not None
            assert torch.equal(torch.cat([gathered[name].reshape(-1) for name in names]), weights[-1])
    budgets = [plan.sampler.budget] * world.size
    if world.size > 1:
        torch.distributed.all_gather_object(budgets, plan.sampler.budget)
    if world.is_main:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        found = {"logs": logs, "gradients": gradients, "weights": weights, "budgets": budgets}
        torch.save(found, out / f"{name}.pt")


def run_out(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if layer.training and (args or [kwargs["hidden_states"]])[0].shape[1] > 2 * LEAST:
        raise torch.OutOfMemoryError("out of memory")


def run_out_in(layer: Any, step: int) -> None:
    if layer.training and step == 5:
        raise torch.OutOfMemoryError("out of memory")


def main(tiny: Path, out: Path, cases: list[str]) -> None:
    memory.FIRST = LEAST
    if any("fsdp" in case for case in cases):
        allow_fsdp_on_cpu()
    try:
        with joined(120) as world:
            for case in cases:
                train(case, tiny, out, world)
    except RunError as error:
        explain(error)
        leave(error.exit_code, 5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
