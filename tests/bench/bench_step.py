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
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

# Before the libraries that read it.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
os.environ |= {"TQDM_DISABLE": "1"}

import datasets
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import compute_flops_per_token, compute_mfu, get_peak_flops

from entrypoint.demo.model import unpack_model
from entrypoint.host import proc_bytes
from tests.bench.sides import Ours, Shape, Side, compact, now, stock
from tests.tiny import tiny_model

ROUNDS = 5
THREADS = 2
MOST_TOKENS = 2560  # of a stock forward call tried on CPU: memory grows by some 3 MB a token, and speed does not
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
            gap, lines = self.steps(shape, alone=shape is self.shapes[0])
            differences.append(gap)
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
        gap = difference(theirs, ours)  # and both are warm
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
        call = f"{'pairs' if shape.method == 'dpo' else 'rows'} a call: {rows}"
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
        return gap, lines

    def fastest_rows(self, shape: Shape) -> int:
        """Rows (DPO: pairs) of a stock forward call that make its step fastest: 1, 2, 4, … as long as that helps."""
        units, width = (shape.groups, 2) if shape.method == "dpo" else (shape.rows, 1)
        best, least, rows = 1, float("inf"), 1
        while rows <= units and (rows == 1 or rows * width * shape.context <= MOST_TOKENS or self.cuda):
            side = stock(shape, self.model, self.scratch, rows=rows)
            try:
                seconds = side.step()
            except torch.OutOfMemoryError:
                break
            finally:
                del side
                release()
            print(f"{shape.name}: stock step of {seconds:.3g} s with {rows} a call", file=sys.stderr)
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
        wanted = json.dumps({"side": side, "shape": asdict(shape), "checkpointing": checkpointing})
        command = [sys.executable, "-m", "tests.bench.bench_step", "--probe", wanted, "--model", str(self.model)]
        command += ["--device", "cuda" if self.cuda else "cpu", "--rounds", str(self.rounds)]
        command += ["--tiny"] if self.tiny else []
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
    side.step()  # the libraries' own buffers
    gradients = sum(parameter.nbytes for parameter in side.model.parameters())
    tops = []
    for _ in range(rounds):
        release()
        before = reset_peak()
        side.step()
        tops.append(read_peak() - before - gradients)
    return float(statistics.median(tops))


def reset_peak() -> int:
    """Bytes held now, from where the peak is counted anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return proc_bytes("self/status", "VmRSS")


def read_peak() -> int:
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else proc_bytes("self/status", "VmHWM")


def release() -> None:
    """Give back what nobody holds: to the device, and from malloc's heap to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


# The command ---------------------------------------------------------------------------------------------------------


def run_probe(bench: Bench, side: str, shape: Shape, *, checkpointing: bool) -> float | None:
    """What `Bench.probe` asks a process of its own for."""
    try:
        if side == "ours":
            return peak(bench.ours(shape, checkpointing=checkpointing), bench.rounds)
        theirs = stock(shape, bench.model, bench.scratch, rows=shape.rows, checkpointing=checkpointing)
        return peak(theirs, bench.rounds)
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
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    cuda = given.device == "cuda"
    if not cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where there is one, TRL takes it
        torch.set_num_threads(1 if given.tiny else THREADS)
    if cuda and not given.tiny and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is at hand; --tiny tries the table without one")
    shapes: tuple[Shape, ...] = CUDA if cuda else CPU
    if given.tiny:
        shapes = tuple(shorter(shape, cuda=cuda) for shape in shapes)
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or make_model(Path(folder) / "model", cuda=cuda, tiny=given.tiny)
        bench = Bench(model, folder, shapes, cuda, given.tiny, given.rounds)
        if given.probe:
            shape = Shape(**given.probe.pop("shape"))
            print(json.dumps(run_probe(bench, shape=shape, **given.probe)))
            return 0
        print_machine()
        print(f"\n{HEADER}", flush=True)
        for line in bench.lines():
            missed += line.missed
            print(line.text(), flush=True)
    return int(missed > 0 and os.environ.get("CHECK") == "1")


if __name__ == "__main__":
    sys.exit(main())
