"""Bench (c): whole optimiser steps, ours against stock TRL given the same sequences.

    python -m tests.bench.bench_step                   # SmolLM2-135M, fp32, two threads
    python -m tests.bench.bench_step --device cuda     # a random 1.5B model, bf16, contexts of 2K to 8K: for an H200
    python -m tests.bench.bench_step --tiny            # either of them with a tiny model and short rows: does it run?

A step is what a one-epoch run pays for it: the reference's forward over the step's responses, the policy's forward and
backward, clipping and AdamW. Both sides take the same random token ids, weights, loss and options, and take turns; a
figure is the median of the rounds. CHECK=1 makes a missed bar an error.

Stock TRL is given the settings that its documentation has for speed and that act here: no gradient checkpointing, one
iteration a batch (so it computes no old log-probs), reference log-probs of DPO precomputed, and as many rows a forward
call as are fastest, found anew for every shape. Every row is as long as the next, so it never computes padding. GRPO
gets its sequences by the public `rollout_func`; DPOTrainer always tokenises text, so its own collator gets the ids.

"compact" is stock TRL with the LM head on scored positions alone, as it computes on CUDA; on CPU it scores every one.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

QUIET = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRL_EXPERIMENTAL_SILENCE", "TQDM_DISABLE")
os.environ |= dict.fromkeys(QUIET, "1")  # before the libraries that read them

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.trainer.utils import compute_flops_per_token, compute_mfu, get_peak_flops

from entrypoint.conf import Dpo, Grpo
from entrypoint.data.groups import Groups, Int64
from entrypoint.demo.model import unpack_model
from entrypoint.training.batches import Units
from entrypoint.training.scoring import Scorer, sequences
from tests.tiny import tiny_model
from tests.trainers.builders import ALONE, GivenReference, make_run, make_trainer

ROUNDS = 5
THREADS = 2
LEARNING_RATE = 1e-6
MOST_TOKENS = 4096  # of a stock forward call on CPU: more was never faster, and takes more memory than a laptop has
CONTEXTS = (8192, 16384, 32768, 65536, 131072)  # tried for the largest that fits
# Of Qwen2-1.5B's shape; Llama's architecture has no biases, which changes nothing here.
LARGE = LlamaConfig(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXTS[-1],
    tie_word_embeddings=True,
    eos_token_id=0,
    pad_token_id=0,
)


@dataclass(frozen=True)
class Shape:
    """A step over `groups` prompts with `size` responses each, lengths in tokens.

    bar: the speed-up that is wanted; None: reported only.
    apart: of each group one response alone, so that nothing is shared.
    """

    method: str
    prompt: int
    response: int
    size: int
    bar: float | None = None
    groups: int = 2
    apart: bool = False

    @property
    def name(self) -> str:
        size = "nothing shared" if self.apart else f"G={self.size}"
        return f"{self.method.upper()}, {self.prompt} : {self.response}, {size}"

    @property
    def rows(self) -> int:
        return self.groups if self.apart else self.groups * self.size

    @property
    def context(self) -> int:
        return self.prompt + self.response

    def settings(self) -> Grpo | Dpo:
        return Grpo() if self.method == "grpo" else Dpo()

    def batch(self, vocabulary: int) -> tuple[Groups, Int64]:
        """Groups of random tokens, and the flat indices of the responses that the step computes.

        Rewards fall from 1 to 0 in equal steps. Apart, a group's best response and the next one's worst take turns:
        the advantages are those of TRL's groups of two rows, whatever their prompts.
        """
        random = np.random.default_rng(0)

        def ids(*shape: int) -> Any:
            return random.integers(3, vocabulary, shape).tolist()

        rewards = np.linspace(1, 0, self.size).tolist()
        rows = [
            {"prompt_ids": ids(self.prompt), "response_ids": ids(self.size, self.response), "rewards": rewards}
            for _ in range(self.groups)
        ]
        each = self.size * np.arange(self.groups)
        return Groups.from_lists(rows), each + np.arange(self.groups) % 2 if self.apart else np.arange(self.rows)


CPU = (
    Shape("grpo", 256, 64, 4, bar=3.8),
    Shape("grpo", 512, 64, 8, bar=6.5),
    Shape("grpo", 64, 64, 4, bar=1.6),
    Shape("dpo", 256, 64, 2, bar=2.0),
    Shape("grpo", 256, 64, 2, bar=0.97, groups=8, apart=True),
)
CUDA = (
    Shape("grpo", 6554, 1638, 8, bar=2.0),
    Shape("grpo", 3277, 819, 8),
    Shape("grpo", 1638, 410, 8),
    Shape("grpo", 2048, 2048, 8),
    Shape("dpo", 6554, 1638, 2),
    Shape("grpo", 6554, 1638, 2, groups=8, apart=True),
)


# The two sides -------------------------------------------------------------------------------------------------------


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Side:
    """A trainer whose optimiser steps are made one by one, so that two sides can take turns."""

    def __init__(self, trainer: Any) -> None:
        trainer.create_optimizer()
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.trainer = trainer

    def gradient(self) -> None:
        """Reference, forward, backward: the step's gradient lies in the parameters afterwards."""
        raise NotImplementedError

    def step(self) -> float:
        """A whole optimiser step; returns its seconds."""
        began = now()
        self.gradient()
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.trainer.optimizer.step()
        self.model.zero_grad()
        return now() - began


class Ours(Side):
    """Our trainer as a run builds it; the reference is scored anew each step, for that step's responses."""

    def __init__(self, shape: Shape, model: Path, scratch: str, *, group_a_call: bool, checkpointing: bool) -> None:
        self.groups, self.responses = shape.batch(AutoConfig.from_pretrained(model).vocab_size)
        budget = {"micro_batch_tokens": shape.prompt + shape.size * shape.response} if group_a_call else {}
        run = make_run(
            shape.settings(),
            Path(scratch),
            batch_size=shape.groups,
            learning_rate=LEARNING_RATE,
            share_prompts="always",
            gradient_checkpointing="always" if checkpointing else "never",
            **{"micro_batch_tokens": 8192} | budget,
        )
        self.reference: Any = GivenReference.fromkeys(self.responses.tolist())
        trainer, plan = make_trainer(run, model, self.groups, reference=self.reference)
        super().__init__(trainer)
        trainer.current_gradient_accumulation_steps = 1
        if shape.apart:
            one = np.arange(shape.groups + 1)
            plan.sampler.units = Units(one[:-1], self.responses, one, atom=1)
        self.micro_batches = next(iter(plan.sampler))
        self.cost = plan.sampler.cost
        self.scorer = Scorer(
            self.model,
            pad=0,
            shared=self.cost.shared,
            budget=plan.sampler.budget,
            device=trainer.args.device,
            world=ALONE,
        )
        self.policy_seconds = 0.0

    def gradient(self) -> None:
        self.model.eval()
        self.reference.update(self.scorer.log_probs(self.groups, self.responses))
        began = now()
        rows = self.trainer._rows
        self.trainer.training_step(self.model, [rows[micro] for micro in self.micro_batches])
        self.policy_seconds = now() - began  # forward and backward alone


def stock_arguments(shape: Shape, rows: int, scratch: str, *, checkpointing: bool) -> dict[str, Any]:
    """What both stock trainers' arguments share; `rows`: of a forward call (DPO: pairs)."""
    units = shape.groups if shape.method == "dpo" else shape.rows
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": units // rows,
        "learning_rate": LEARNING_RATE,
        "gradient_checkpointing": checkpointing,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "disable_dropout": True,
        "report_to": "none",
    }


class StockGrpo(Side):
    """`GRPOTrainer`: `training_step` rolls out, scores with its reference model, and computes the loss."""

    def __init__(self, shape: Shape, model: Path, scratch: str, *, rows: int, checkpointing: bool) -> None:
        groups, responses = shape.batch(AutoConfig.from_pretrained(model).vocab_size)
        pairs = sequences(groups, responses)
        logged = {
            "prompt_ids": [prompt.tolist() for prompt, _ in pairs],
            "completion_ids": [response.tolist() for _, response in pairs],
            "logprobs": None,
            "logged_reward": groups.rewards[responses].tolist(),
        }
        method = Grpo()
        args = GRPOConfig(
            **stock_arguments(shape, rows, scratch, checkpointing=checkpointing),
            num_generations=shape.size,
            beta=method.kl_coeff,
            epsilon=method.clip_range,
            loss_type=method.loss_type,
        )
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=lambda logged_reward, **_: logged_reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            processing_class=AutoTokenizer.from_pretrained(model),
            rollout_func=lambda prompts, trainer: dict(logged),
        )
        super().__init__(trainer)
        trainer.current_gradient_accumulation_steps = self.calls = shape.rows // rows
        self.rows = shape.rows

    def gradient(self) -> None:
        prompts = [{"prompt": ""} for _ in range(self.rows)]
        for _ in range(self.calls):  # the first rolls out and scores for all
            self.trainer.training_step(self.model, prompts, None)


class StockDpo(Side):
    """`DPOTrainer` with precomputed reference log-probs, which its own method computes once for each pair."""

    def __init__(self, shape: Shape, model: Path, scratch: str, *, rows: int, checkpointing: bool) -> None:
        groups, _ = shape.batch(AutoConfig.from_pretrained(model).vocab_size)
        self.pairs = [
            {
                "prompt_ids": group.prompt_ids.tolist(),
                "chosen_ids": group.response_ids[0].tolist(),
                "rejected_ids": group.response_ids[-1].tolist(),
            }
            for group in groups
        ]
        method = Dpo()
        args = DPOConfig(
            **stock_arguments(shape, rows, scratch, checkpointing=checkpointing),
            beta=method.beta,
            loss_type=[method.loss_type],
            max_length=None,
            precompute_ref_log_probs=True,
        )
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        super().__init__(trainer)
        trainer.current_gradient_accumulation_steps = len(self.pairs) // rows
        self.rows = rows

    def gradient(self) -> None:
        for first in range(0, len(self.pairs), self.rows):
            batch = self.trainer.data_collator(self.pairs[first : first + self.rows])
            batch = {name: value.to(self.trainer.args.device) for name, value in batch.items()}
            chosen, rejected = self.trainer.compute_ref_log_probs(self.model, batch)
            batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            self.trainer.training_step(self.model, batch)


def stock(shape: Shape, model: Path, scratch: str, *, rows: int, checkpointing: bool = False) -> Side:
    side = StockGrpo if shape.method == "grpo" else StockDpo
    return side(shape, model, scratch, rows=rows, checkpointing=checkpointing)


def compact() -> AbstractContextManager[Any]:
    """Stock TRL's fused head scores labelled positions alone, as it does on CUDA; the kernel stays the CPU's."""
    return patch("trl.trainer.utils._use_triton", lambda device: True)


# Measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of the table; `bar` is what `ratio` must reach, or stay under where `most`; None: reported only."""

    name: str
    ours: str
    theirs: str
    ratio: float
    bar: float | None
    most: bool = False
    compact: str = ""

    @property
    def missed(self) -> bool:
        return self.bar is not None and not (self.ratio <= self.bar if self.most else self.ratio >= self.bar)

    def text(self) -> str:
        digits = ".1e" if self.most and self.ratio < 1e-2 else ".2f"
        bar = "" if self.bar is None else f"{'<=' if self.most else '>='} {self.bar:g}"
        verdict = "" if self.bar is None else "missed" if self.missed else "met"
        cells = (self.name, self.ours, self.theirs, f"{self.ratio:{digits}}", bar, verdict, self.compact)
        return f"| {' | '.join(cells)} |"


HEADER = "| | ours | stock TRL | ratio | bar | | compact |\n|---|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Bench:
    """What is measured, and with which model."""

    model: Path
    scratch: str
    shapes: tuple[Shape, ...]
    cuda: bool
    tiny: bool
    rounds: int

    def ours(self, shape: Shape, *, checkpointing: bool = False) -> Ours:
        return Ours(shape, self.model, self.scratch, group_a_call=self.cuda, checkpointing=checkpointing)

    def lines(self) -> Iterator[Line]:
        """The table, line by line as it is measured."""
        differences = []
        for shape in self.shapes:
            apart, lines = self.steps(shape, alone=shape is self.shapes[0])
            differences.append(apart)
            yield from lines
            release()
        bar = None if self.cuda else 1e-5  # in bf16 the two differ by rounding
        yield Line("greatest gradient difference, relative L2", "", "", max(differences), bar, most=True)
        yield self.memory()
        if self.cuda:
            yield self.largest()

    def steps(self, shape: Shape, *, alone: bool) -> tuple[float, list[Line]]:
        """The gradients' difference, and the seconds of a step; `alone`: forward and backward by themselves too."""
        ours = self.ours(shape)
        rows = self.fastest_rows(shape)
        theirs = stock(shape, self.model, self.scratch, rows=rows)
        apart = difference(theirs, ours)  # and both are warm
        bare = Bare(theirs, ours)
        seconds: dict[str, list[float]] = {"stock": [], "ours": [], "policy": [], "bare": [], "compact": []}
        for _ in range(self.rounds):
            seconds["stock"].append(theirs.step())
            seconds["ours"].append(ours.step())
            seconds["policy"].append(ours.policy_seconds)
            if alone:
                seconds["bare"].append(bare.seconds())
            if not torch.cuda.is_available():
                with compact():
                    seconds["compact"].append(theirs.step())
        middle = {name: statistics.median(values) for name, values in seconds.items() if values}
        took = {name: f"{value:.3g} s" for name, value in middle.items()}
        call = f"{rows} {'pairs' if shape.method == 'dpo' else 'rows'} a call"
        tight = f"{took['compact']}, {middle['compact'] / middle['ours']:.2f}" if "compact" in middle else ""
        ratio = middle["stock"] / middle["ours"]
        lines = [Line(shape.name, took["ours"], f"{took['stock']} ({call})", ratio, shape.bar, compact=tight)]
        if alone:
            tokens = ours.micro_batches[0].step.distinct
            mine, plain = tokens / middle["policy"], tokens / middle["bare"]
            name = "distinct tokens/s of that forward and backward; beside it one causal row"
            bar = None if self.cuda else 0.90
            lines.append(Line(name, f"{mine:,.0f}", f"{plain:,.0f}", mine / plain, bar))
            if self.cuda:
                lines.append(mfu(shape, ours, middle["policy"]))
        return apart, lines

    def fastest_rows(self, shape: Shape) -> int:
        """Rows (DPO: pairs) of a stock forward call that make its step fastest: 1, 2, 4, … as long as that helps."""
        units, width = (shape.groups, 2) if shape.method == "dpo" else (shape.rows, 1)
        best, least, rows = 1, float("inf"), 1
        while rows <= units and (rows == 1 or rows * width * shape.context <= MOST_TOKENS or self.cuda):
            side = stock(shape, self.model, self.scratch, rows=rows)
            try:
                if rows == 1:
                    side.step()  # warms the allocator
                seconds = side.step()
            except torch.OutOfMemoryError:
                break
            finally:
                del side
                release()
            if seconds > least:
                break
            best, least, rows = rows, seconds, rows * 2
        return best

    def memory(self) -> Line:
        """Peak memory of a step over the resident state, the same rows in one micro-batch on both sides."""
        shape = replace(self.shapes[2], groups=1) if self.cuda else self.shapes[0]
        ours, theirs = (self.probe(side, shape) for side in ("ours", "stock"))
        assert ours is not None
        assert theirs is not None
        name = f"peak memory of a step above the resident state, {shape.name}, {shape.rows} rows a call"
        bar = None if self.cuda else 0.45
        return Line(name, f"{ours / 2**20:,.0f} MiB", f"{theirs / 2**20:,.0f} MiB", ours / theirs, bar, most=True)

    def largest(self) -> Line:
        """The largest context, 4:1, of which a whole group fits in one micro-batch with gradient checkpointing."""
        fits = {"ours": 0, "stock": 0}
        for side in fits:
            for context in (32, 64) if self.tiny else CONTEXTS:
                prompt = context * 4 // 5
                shape = replace(self.shapes[0], prompt=prompt, response=context - prompt, groups=1)
                if self.probe(side, shape, checkpointing=True) is None:
                    break
                fits[side] = context
        ratio = fits["ours"] / fits["stock"] if fits["stock"] else float("inf")
        return Line("largest context, a group of 8 a call", f"{fits['ours']:,}", f"{fits['stock']:,}", ratio, None)

    def probe(self, side: str, shape: Shape, *, checkpointing: bool = False) -> float | None:
        """`peak` in a process of its own: bytes; None where the device's memory is too small."""
        given = {"side": side, "shape": asdict(shape), "checkpointing": checkpointing, "model": str(self.model)}
        given |= {"rounds": self.rounds, "cuda": self.cuda, "tiny": self.tiny}
        command = [sys.executable, "-m", "tests.bench.bench_step", "--probe", json.dumps(given)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: float | None = json.loads(done.stdout.splitlines()[-1])
        return found


class Bare:
    """Forward and backward of our distinct tokens, in one plain causal row for each of our forward calls.

    The model is the stock side's, with the same fused head on as many positions; the loss is their sum.
    """

    def __init__(self, side: Side, ours: Ours) -> None:
        self.model = side.model
        self.batches = []
        for micro in ours.micro_batches:
            tokens = ours.cost.distinct(list(micro.responses))
            scored = int(ours.cost.response[list(micro.responses)].sum())
            ids = torch.randint(3, self.model.config.vocab_size, (1, tokens), device=self.model.device)
            labels = ids.clone()
            labels[:, :-scored] = -100
            self.batches.append({"input_ids": ids, "labels": labels})

    def seconds(self) -> float:
        began = now()
        with compact():
            for batch in self.batches:
                self.model(**batch, fused_lm_head=True).log_probs.sum().backward()
        took = now() - began
        self.model.zero_grad()
        return took


def difference(theirs: Side, ours: Side) -> float:
    """Relative L2 difference of the step's gradients over all parameters, before clipping, at the same weights."""
    theirs.gradient()
    wanted = [parameter.grad.clone() for parameter in theirs.model.parameters()]
    theirs.model.zero_grad()
    ours.gradient()
    found = [parameter.grad for parameter in ours.model.parameters()]
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(found, wanted, strict=True))
    whole = sum(float(b.double().square().sum()) for b in wanted)
    ours.model.zero_grad()
    return float((apart / whole) ** 0.5)


def mfu(shape: Shape, ours: Ours, seconds: float) -> Line:
    """Model FLOPs utilisation of our forward and backward, on distinct tokens and nothing else.

    Attention is counted as it is needed, by the keys that a token sees (a prompt's sees half of the prompt on average,
    a response's the prompt and half of the response), and the LM head on scored positions alone.
    """
    config = ours.model.config
    prompts, responses = shape.groups * shape.prompt, shape.rows * shape.response
    tokens = prompts + responses
    keys = (prompts * shape.prompt / 2 + responses * (shape.prompt + shape.response / 2)) / tokens
    head = 3 * 2 * config.vocab_size * config.hidden_size
    flops = compute_flops_per_token(config, round(keys)) - head * prompts / tokens
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    most = get_peak_flops(device, "bfloat16") or float("nan")
    share = compute_mfu(flops, tokens / seconds, 1, most) / 100
    return Line("MFU of that forward and backward, on distinct tokens", "", f"{most:.3g} FLOP/s", share, 0.50)


def peak(side: Side, rounds: int) -> float:
    """Bytes of a step's peak above weights, gradients, optimiser and libraries: the median of `rounds` steps."""
    side.step()  # from here on the optimiser's state is there
    gradients = sum(parameter.nbytes for parameter in side.model.parameters())
    tops = []
    for _ in range(rounds):
        release()
        before = reset_peak()
        side.step()
        tops.append(read_peak() - before - gradients)
    return statistics.median(tops)


def reset_peak() -> int:
    """Bytes held now, from where the peak is counted anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def read_peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status("VmHWM")


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status, which are in kB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def release() -> None:
    """Give back what nobody holds: to the device, and from malloc's heap to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


# The command ---------------------------------------------------------------------------------------------------------


def run_probe(given: dict[str, Any]) -> float | None:
    """`peak` of one side, or None where it does not fit: what `Bench.probe` asks a process of its own for."""
    shape = Shape(**given["shape"])
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(given["model"]), scratch, (), given["cuda"], given["tiny"], given["rounds"])
        try:
            side: Side
            if given["side"] == "ours":
                side = bench.ours(shape, checkpointing=given["checkpointing"])
            else:
                side = stock(shape, bench.model, scratch, rows=shape.rows, checkpointing=given["checkpointing"])
            return peak(side, bench.rounds)
        except torch.OutOfMemoryError:
            return None


def make_model(folder: Path, *, cuda: bool, tiny: bool) -> Path:
    """The table's model on disk, where TRL reads its reference from."""
    if not cuda and not tiny:
        return unpack_model()
    tiny_model(folder)
    if not tiny:
        torch.manual_seed(0)
        with torch.device("cuda"):
            LlamaForCausalLM(LARGE).save_pretrained(folder)
    return folder


def shorter(shape: Shape, *, cuda: bool) -> Shape:
    """For --tiny, whose model has 512 positions."""
    by = 64 if cuda else 8
    return replace(shape, prompt=shape.prompt // by, response=shape.response // by)


def print_machine() -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = platform.processor() or platform.machine()
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"{machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB{device}")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "accelerate"))
    print(f"Python {platform.python_version()}, {libraries}; load {os.getloadavg()[0]:.1f} before")


def main() -> int:
    """Run the bench; the exit code says whether CHECK=1 is content."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short rows, on whatever device there is")
    parser.add_argument("--probe", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    cuda = given.device == "cuda"
    if not cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where there is one, TRL takes it
        torch.set_num_threads(1 if given.tiny else THREADS)
    if given.probe:
        print(json.dumps(run_probe(given.probe)))
        return 0
    if cuda and not given.tiny and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is at hand; --tiny tries the table without one")
    shapes = CUDA if cuda else CPU
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", cuda=cuda, tiny=given.tiny)
        if given.tiny:
            shapes = tuple(shorter(shape, cuda=cuda) for shape in shapes)
        print_machine()
        print(f"\n{HEADER}", flush=True)
        missed = 0
        for line in Bench(model, folder, shapes, cuda, given.tiny, given.rounds).lines():
            missed += line.missed
            print(line.text(), flush=True)
    return int(missed > 0 and os.environ.get("CHECK") == "1")


if __name__ == "__main__":
    sys.exit(main())
