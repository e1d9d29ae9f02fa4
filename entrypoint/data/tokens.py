"""Prompts and responses to token ids: once, separately, by the base model's own tokenizer and chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from entrypoint.errors import DataError, ModelError

Ids = list[int]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the local `folder`; nothing is downloaded, and no code of the model's is run.

    Raises:
        ModelError: there is none, it has no fast form, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes the library raise
        message = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{folder}: no tokenizer can be loaded ({message}); expected tokenizer.json beside the model"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise ModelError(
            f"{folder}: the tokenizer has no fast form; expected tokenizer.json; convert it once and save it"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    return tokenizer


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes whenever the tokenizer would give other ids; independent of the folder that it came from."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core.pop("truncation", None)  # state of the last call, not of the tokenizer
    core.pop("padding", None)
    parts = [core, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Tokens:
    """Tokenises prompts and responses. `refusal` is what the chat template said to the first prompt it refused."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.eos = int(tokenizer.eos_token_id)
        self.refusal = ""
        self._tokenizer = tokenizer

    def prompts(self, texts: Sequence[str], chat: Sequence[bool]) -> list[Ids | None]:
        """Token ids of each prompt; None where the chat template refuses it.

        Chat goes through the template, up to where the assistant's turn begins. Text gets what the tokenizer puts
        before it by default (begin-of-sequence, if that), but not an end-of-sequence: the response follows.

        Args:
            texts: canonical prompts.
            chat: which of them are chat messages.

        Raises:
            DataError: a prompt is chat and the tokenizer has no chat template.
        """
        found: list[Ids | None] = [None] * len(texts)
        plain = [i for i, is_chat in enumerate(chat) if not is_chat]
        for i, ids in zip(plain, self._encode([texts[i] for i in plain], special=True), strict=True):
            found[i] = ids[:-1] if len(ids) > 1 and ids[-1] == self.eos else ids
        talks = [i for i, is_chat in enumerate(chat) if is_chat]
        if talks and not self._tokenizer.chat_template:
            raise DataError(
                "the traces hold chat messages, but the base model's tokenizer has no chat template; put"
                " chat_template.jinja beside the model, or set data.format=text to train on the JSON as it is"
            )
        for i, rendered in zip(talks, self._render([json.loads(texts[i]) for i in talks]), strict=True):
            found[i] = rendered
        return found

    def responses(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each response, no special tokens added but the one end-of-sequence that ends it."""
        return [ids if ids and ids[-1] == self.eos else [*ids, self.eos] for ids in self._encode(texts, special=False)]

    def _encode(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        # What `tokenizer(texts)` calls, without the offsets and masks that nobody reads: twice as fast.
        core = self._tokenizer.backend_tokenizer
        core.no_truncation()  # what an earlier call may have left; every call of the tokenizer sets its own
        core.no_padding()
        return [encoding.ids for encoding in core.encode_batch_fast(list(texts), add_special_tokens=special)]

    def _render(self, conversations: list[Any]) -> list[Ids | None]:
        rendered: list[str | None] = [self._template(conversation) for conversation in conversations]
        given = iter(self._encode([text for text in rendered if text is not None], special=False))
        return [None if text is None else next(given) for text in rendered]

    def _template(self, conversation: Any) -> str | None:
        try:
            text = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is code: whatever it raises refuses this prompt
            self.refusal = self.refusal or " ".join(str(error).split())[:200] or type(error).__name__
            return None
        return str(text)
