"""One rank of a test run: `python -m tests.trainers.train_rank TINY OUT CASE…`; rank 0 writes what each step did.

A case is NAME:METHOD:LOSS:BUDGET[:from=FOLDER][:lora][:fsdp][:bf16]; its numbers go to OUT/NAME.pt: loss and gradient
norm of every step, the gradient before clipping and the weights, each as one flat vector.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from entrypoint.conf import Dpo, Grpo
from entrypoint.save import full_state
from entrypoint.world import World, joined
from tests.trainers.builders import make_run, make_trainer
from tests.trainers.fsdp_on_cpu import allow_fsdp_on_cpu
from tests.trainers.sample_groups import ragged_groups

STEPS = 8


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
        micro_batch_tokens=int(budget),
        sharding=sharding,
        precision=precision,
    )
    trainer, _ = make_trainer(run, tiny, ragged_groups(13, logged=method == "grpo"), world=world)
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
    found = world.once(lambda: str(path) if (path := trainer._checkpoints.find("auto")) else None)
    trainer.train(resume_from_checkpoint=found)
    trainer._checkpoints.wait()
    weights.append(flat([p for p in trainer.model_wrapped.parameters() if p.requires_grad]))
    if "fsdp" in options:
        gathered = full_state(SimpleNamespace(trainer=trainer))  # type: ignore[arg-type]
        if world.is_main:
            names = [name for name, _ in trainer.model_wrapped.named_parameters()]
            assert gathered is not None
            assert torch.equal(torch.cat([gathered[name].reshape(-1) for name in names]), weights[-1])
    if world.is_main:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"logs": logs, "gradients": gradients, "weights": weights}, out / f"{name}.pt")


def main(tiny: Path, out: Path, cases: list[str]) -> None:
    if any("fsdp" in case for case in cases):
        allow_fsdp_on_cpu()
    with joined(120) as world:
        for case in cases:
            train(case, tiny, out, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
