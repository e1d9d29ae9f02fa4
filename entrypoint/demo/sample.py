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
from pathlib import Path
from typing import Any

from entrypoint.demo.model import unpack_model
from entrypoint.demo.prompts import Prompt, compose
from entrypoint.demo.rows import Response, rows, write
from entrypoint.errors import ConfigError, RunError

SEED = 20261116
RESPONSES = 8  # tries of each prompt
LIMITS = {"label": 12, "sentence": 48}  # tokens by form, as a service would set max_tokens
BATCH = 96  # rows decoded together


Tried = tuple[list[int], float]  # token ids without the end token, seconds until it came


def sample(prompts: Sequence[Prompt], model_folder: Path) -> Iterator[Response]:
    """`RESPONSES` tries of each prompt, in the prompts' order.

    A try that reaches its limit is left out: training appends an end-of-sequence, which the model did not choose there.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows = [prompt for prompt in prompts for _ in range(RESPONSES)]
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        torch.manual_seed(SEED + start)
        texts = [_rendered(prompt, tokenizer) for prompt in batch]
        for prompt, tried in zip(batch, _decode(model, tokenizer, texts, _limits(batch)), strict=True):
            if tried is not None:
                ids, seconds = tried
                yield Response(prompt, tokenizer.decode(ids), len(ids), 1000 * seconds)
        print(f"{start + len(batch)} of {len(rows)} tries", flush=True)


def _limits(prompts: Sequence[Prompt]) -> list[int]:
    return [LIMITS[prompt.rule.form] for prompt in prompts]


def _rendered(prompt: Prompt, tokenizer: Any) -> str:
    if prompt.text is not None:
        return prompt.text
    return str(tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True))


def _decode(model: Any, tokenizer: Any, prompts: list[str], limits: list[int]) -> list[Tried | None]:
    """One response to each prompt, decoded together; None for one that was not done at its limit."""
    import torch

    encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    step, mask = encoded["input_ids"], encoded["attention_mask"]  # (B, L)
    position = mask.cumsum(-1).sub(1).clamp(min=0)
    alive, cache, began = torch.arange(len(prompts)), None, time.perf_counter()
    ids: list[list[int]] = [[] for _ in prompts]
    found: list[Tried | None] = [None] * len(prompts)
    for number in range(max(limits)):
        with torch.inference_mode():
            out = model(step, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)
        drawn = torch.multinomial(out.logits[:, -1].softmax(-1), 1)  # (B, 1)
        for row, token in zip(alive.tolist(), drawn[:, 0].tolist(), strict=True):
            if token == tokenizer.eos_token_id:
                found[row] = (ids[row], time.perf_counter() - began)
            else:
                ids[row].append(token)
        going = (drawn[:, 0] != tokenizer.eos_token_id) & (torch.tensor(limits)[alive] > number + 1)
        if not going.any():
            break
        cache, keep = out.past_key_values, going.nonzero()[:, 0]
        cache.batch_select_indices(keep)  # rows that are done cost nothing from here on
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
        responses = list(sample(compose(), unpack_model()))
        for path in write(rows(responses, seed=SEED), out):
            print(path, flush=True)
    except (RunError, OSError) as error:
        print(f"sample: {error}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, RunError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
