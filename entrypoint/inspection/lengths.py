"""Tokens of prompts and responses: counted by the base model's tokenizer, or estimated where there is none."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from entrypoint.data.groups import Float64, Int64
from entrypoint.data.index import Index
from entrypoint.data.report import Counts, Reason
from entrypoint.data.rules import Rules
from entrypoint.data.scan import Scan
from entrypoint.errors import ModelError
from entrypoint.inspection.responses import Responses
from entrypoint.storage import explained, filesystem, is_s3, local_path

SAMPLE = 20_000  # responses that are tokenised: some seconds, and a share of 1 % is known to a tenth of it
BYTES_PER_TOKEN = 4.0  # of UTF-8, with today's vocabularies: English text; others are between 3 and 5


@dataclass(frozen=True)
class Lengths:
    """Tokens of some responses and of their prompts, those of a prompt side by side.

    Shape: each (n,). `group` numbers the prompts; `source` says where the numbers come from: `tokenizer`,
    `token_count` or `bytes`; `complete` is false for a sample.
    """

    group: Int64
    prompt: Float64
    response: Float64
    source: str
    complete: bool

    @property
    def total(self) -> Float64:
        return self.prompt + self.response


def estimate(responses: Responses) -> Lengths:
    """From the column `token_count`, taken as the response's tokens, where it is there; else from bytes.

    Prompts are taken to have as many bytes a token as the counted responses.
    """
    counted = responses.token_count > 0  # false for NaN
    rate, source = BYTES_PER_TOKEN, "bytes"
    if counted.any():
        rate, source = responses.response_bytes[counted].sum() / responses.token_count[counted].sum(), "token_count"
    tokens = np.where(counted, responses.token_count, np.ceil(responses.response_bytes / rate))
    return Lengths(responses.group, np.ceil(responses.prompt_bytes / rate), tokens, source, complete=True)


@dataclass(frozen=True)
class Tokenizer:
    """Counts tokens exactly, as preparation does; of more than SAMPLE responses, those of some prompts.

    Args:
        path, endpoint_url: the base model's, local or s3://; only its small files are fetched.
    """

    path: str
    endpoint_url: str | None

    def count(
        self, responses: Responses, scan: Scan, rules: Rules, counts: Counts, max_length: int
    ) -> tuple[Lengths, Responses]:
        """The lengths of `responses`, and those that are left when what is too long is dropped.

        The traces are read a second time. A sample says nothing about single rows, so then nothing is dropped.

        Raises:
            ModelError: there is no usable tokenizer.
            DataError: the traces hold chat and the tokenizer has no chat template.
        """
        # Prompts are in the order of their hashes: the first are a sample like any other.
        some = responses.where(np.arange(min(len(responses), SAMPLE)))
        with tempfile.TemporaryDirectory() as folder:
            prompt, response = self._count(some, scan, rules, counts, Path(folder))
        refused = prompt < 0
        read = ~refused
        lengths = Lengths(
            some.group[read], prompt[read], response[read], "tokenizer", complete=len(some) == len(responses)
        )
        if not lengths.complete:
            return lengths, responses
        long = read & (prompt + response > max_length)
        counts.drop(Reason.UNPARSABLE, int(refused.sum()))
        counts.drop(Reason.TOO_LONG, int(long.sum()))
        return lengths, responses.where(read & ~long).usable(rules, counts)

    def _count(
        self, some: Responses, scan: Scan, rules: Rules, counts: Counts, folder: Path
    ) -> tuple[Float64, Float64]:
        """Tokens of each of `some`'s prompts, −1 where the chat template refuses it, and responses. Shape: (n,)."""
        from entrypoint.data.gather import sorted_rows  # these import torch: only who names a model waits for it
        from entrypoint.data.tokens import Tokens, load_tokenizer

        tokens = Tokens(load_tokenizer(self._folder(folder)))
        order = np.argsort(some.row)
        index = Index(some.row[order], some.reward[order])
        prompt, response = np.zeros(len(some)), np.zeros(len(some))
        for table in sorted_rows(scan, rules, index, folder / "spill"):
            # Of several spellings that count as one prompt, the first is the group's, as in preparation.
            table = table.sort_by([("hash", "ascending"), ("prompt", "ascending")])
            hashes = table["hash"].to_numpy()
            firsts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
            texts, chat = table["prompt"].take(pa.array(firsts)), table["chat"].take(pa.array(firsts))
            found = [-1 if ids is None else len(ids) for ids in tokens.prompts(texts.to_pylist(), chat.to_pylist())]
            at = order[np.searchsorted(index.rows, table["row"].to_numpy())]
            prompt[at] = np.repeat(found, np.diff(np.append(firsts, len(hashes))))
            response[at] = [len(ids) for ids in tokens.responses(table["response"].to_pylist())]
        counts.refusal = tokens.refusal
        return prompt, response

    def _folder(self, cache: Path) -> Path:
        """A local folder that holds the tokenizer."""
        from entrypoint.model.folder import INDEX, PARTS

        if not is_s3(self.path):
            folder = local_path(self.path)
            if not folder.is_dir():
                raise ModelError(f"model.path: no such folder: {self.path!r}; the tokenizer is read from it")
            return folder
        url = self.path.rstrip("/")
        folder = cache / "tokenizer"
        folder.mkdir()
        with explained(url, ModelError, local=cache):
            fs = filesystem(url, self.endpoint_url)
            for entry in fs.ls(url, detail=True):
                name = entry["name"].rsplit("/", 1)[-1]
                if PARTS.fullmatch(name) and name != INDEX:
                    fs.get_file(entry["name"], str(folder / name))
        return folder
