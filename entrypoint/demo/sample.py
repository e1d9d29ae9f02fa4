"""The demo's traces: responses sampled from the model itself, scored, and stored as Hive-partitioned Parquet.

    python -m entrypoint.demo.sample --out DIR

Sampling is plain: temperature 1, no top-k, no top-p. So the policy that gave the responses is exactly the model that
training starts from, and GRPO's ratio to the behaviour policy begins at 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoint.demo.model import unpack_model
from entrypoint.demo.prompts import Prompt, compose
from entrypoint.demo.rows import rows, write
from entrypoint.errors import ConfigError, RunError

SEED = 20261116
RESPONSES = 6  # of each prompt
MAX_TOKENS = 48  # a response that is not done by then stays as it is, cut: it scores low
BATCH = 96  # rows decoded together


@dataclass(frozen=True)
class Response:
    """One sampled response to one prompt."""

    prompt: Prompt
    text: str
    tokens: int
    latency_ms: float


def sample(prompts: Sequence[Prompt], model_folder: Path) -> Iterator[Response]:
    """`RESPONSES` responses to each prompt, in the prompts' order."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows = [prompt for prompt in prompts for _ in range(RESPONSES)]
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        torch.manual_seed(SEED + start)
        decoded = _decode(model, tokenizer, [_rendered(prompt, tokenizer) for prompt in batch])
        for prompt, (ids, seconds) in zip(batch, decoded, strict=True):
            yield Response(prompt, tokenizer.decode(ids), len(ids), 1000 * seconds)


def _rendered(prompt: Prompt, tokenizer: Any) -> str:
    if prompt.text is not None:
        return prompt.text
    return str(tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True))


def _decode(model: Any, tokenizer: Any, prompts: list[str]) -> list[tuple[list[int], float]]:
    """Token ids without the end token, and seconds until the last of them, of one response to each prompt."""
    import torch

    encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    step, mask = encoded["input_ids"], encoded["attention_mask"]  # (B, L)
    position = mask.cumsum(-1).sub(1).clamp(min=0)
    alive = torch.arange(len(prompts))
    cache, began = None, time.perf_counter()
    found: list[tuple[list[int], float]] = [([], 0.0) for _ in prompts]
    for _ in range(MAX_TOKENS):
        with torch.inference_mode():
            out = model(step, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)
        drawn = torch.multinomial(out.logits[:, -1].softmax(-1), 1)  # (B, 1)
        going = drawn[:, 0] != tokenizer.eos_token_id
        for row, token, goes in zip(alive.tolist(), drawn[:, 0].tolist(), going.tolist(), strict=True):
            ids = [*found[row][0], token] if goes else found[row][0]
            found[row] = (ids, time.perf_counter() - began)
        if not going.any():
            break
        cache, keep = out.past_key_values, going.nonzero()[:, 0]
        cache.batch_select_indices(keep)  # finished rows cost nothing from here on
        alive, step, position = alive[keep], drawn[keep], position[keep, -1:] + 1
        mask = torch.cat([mask[keep], torch.ones_like(step)], dim=1)
    return found


def main(argv: Sequence[str]) -> int:
    """Sample, score and write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m entrypoint.demo.sample", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="an empty or new folder for the traces")
    out = parser.parse_args(argv).out
    try:
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"--out {out}: is not empty; the traces of two samplings would mix: name a new folder")
        responses: list[Response] = []
        prompts = compose()
        for response in sample(prompts, unpack_model()):
            responses.append(response)
            if len(responses) % BATCH == 0:
                print(f"{len(responses)} of {len(prompts) * RESPONSES} responses", flush=True)
        for path in write(rows(responses, per_prompt=RESPONSES, seed=SEED), out):
            print(path, flush=True)
    except (RunError, OSError) as error:
        print(f"sample: {error}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, RunError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
