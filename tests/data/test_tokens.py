"""Prompts and responses to ids, once, by the tokenizer's own rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from entrypoint.data.report import NoGroupLeft
from entrypoint.data.tokens import Tokens, load_tokenizer
from entrypoint.errors import ConfigError, DataError, ModelError
from tests.data.traces import contents, group, prepared, row, write
from tests.tiny import tiny_model

Tokenizer = PreTrainedTokenizerBase
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_chat_goes_through_the_template_up_to_the_assistants_turn(tokenizer: Tokenizer) -> None:
    (ids,) = Tokens(tokenizer).prompts([json.dumps(CHAT)], [True])
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ids is not None
    assert tokenizer.decode(ids) == expected


def test_text_gets_begin_of_sequence_where_the_tokenizer_adds_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """And the response doesn't: it follows the prompt."""
    with_bos = load_tokenizer(tiny_model(tmp_path, bos=True))
    tokens = Tokens(with_bos)
    (ids,) = tokens.prompts(["fox"], [False])
    assert ids is not None
    assert ids[0] == with_bos.bos_token_id
    assert ids[1:] == tokenizer("fox")["input_ids"]
    assert tokens.responses(["fox"]) == [[*tokenizer("fox")["input_ids"], with_bos.eos_token_id]]
    (chat,) = tokens.prompts([json.dumps(CHAT)], [True])
    assert chat is not None
    assert with_bos.bos_token_id not in chat  # the template alone decides


def test_a_response_ends_with_one_end_of_sequence(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_token_id
    plain, logged = Tokens(tokenizer).responses(["fox", "fox<|im_end|>"])
    assert plain == logged
    assert plain.count(eos) == 1


def test_a_text_prompt_never_ends_with_end_of_sequence(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = load_tokenizer(tiny_model(tmp_path))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    assert tokenizer("fox")["input_ids"][-1] == tokenizer.eos_token_id
    (ids,) = Tokens(tokenizer).prompts(["fox"], [False])
    assert ids == tokenizer("fox")["input_ids"][:-1]


def test_a_prompt_that_the_tokenizer_drops_is_empty(tmp_path: Path, lake: Path, cache: Path) -> None:
    from tokenizers import normalizers

    tokenizer = load_tokenizer(tiny_model(tmp_path / "model"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    write(lake / "a.parquet", group("~~", 0.9, 0.1) + group("p", 0.9, 0.1))
    assert prepared(tokenizer, lake, cache).counts.dropped == {"EMPTY": 2}


def test_mixed_text_and_chat_keep_their_places(tokenizer: Tokenizer) -> None:
    refused = json.dumps([{"role": "wizard", "content": "Abracadabra"}])
    tokens = Tokens(tokenizer)
    found = tokens.prompts(
        ["a", json.dumps(CHAT), "b", refused, json.dumps(CHAT[1:])], [False, True, False, True, True]
    )
    single = [Tokens(tokenizer).prompts([text], [text[0] == "["])[0] for text in ("a", json.dumps(CHAT), "b")]
    assert found[:3] == single
    assert found[3] is None
    assert found[4] is not None
    assert tokens.refusal == "unknown role wizard"


def test_what_the_template_refuses_is_unparsable_chat(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    refused = json.dumps([{"role": "wizard", "content": "Abracadabra"}])
    write(lake / "a.parquet", group(json.dumps(CHAT), 0.9, 0.1) + group(refused, 0.9, 0.5, 0.1))
    counts = prepared(tokenizer, lake, cache).counts
    assert counts.dropped == {"UNPARSABLE": 3}
    assert counts.refusal == "unknown role wizard"
    assert counts.text().endswith("the first with: unknown role wizard")


def test_chat_without_a_template_says_what_to_do(tmp_path: Path, lake: Path, cache: Path) -> None:
    tokenizer = load_tokenizer(tiny_model(tmp_path / "model"))
    tokenizer.chat_template = None
    write(lake / "a.parquet", group(json.dumps(CHAT), 0.9, 0.1))
    with pytest.raises(DataError, match=r"no chat template; put chat_template.jinja .* data.format=text"):
        prepared(tokenizer, lake, cache)
    assert prepared(tokenizer, lake, cache, format="text").counts.train_groups == 1


def test_text_and_chat_logs_of_the_same_response_are_one(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    chat = json.dumps(CHAT)
    reply = json.dumps([{"role": "assistant", "content": "Hello"}])
    write(lake / "a.parquet", [row(chat, "Hello", 0.9), row(chat, reply, 0.7), row(chat, "Go away", 0.1)])
    result = prepared(tokenizer, lake, cache)
    assert result.train[0].rewards.tolist() == [0.8, 0.1]
    assert tokenizer.decode(result.train[0].response_ids[0]) == "Hello<|im_end|>"


def test_recorded_log_probs_are_used_where_their_tokens_agree(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """One with the end of sequence, one without, one of other tokens, one not recorded, one of another length."""
    ids = [*tokenizer("fox dog")["input_ids"]]
    eos = tokenizer.eos_token_id
    other = tokenizer("cat")["input_ids"]
    logs = [
        row("p", "fox dog", 0.9, lp=[-1.0] * (len(ids) + 1), ids=[*ids, eos]),
        row("q", "fox dog", 0.9, lp=[-0.5] * len(ids), ids=ids),
        row("p", "cat", 0.1, lp=[-1.0] * len(ids), ids=ids),
        row("q", "cat", 0.1, lp=None, ids=None),
        row("p", "cat dog", 0.2, lp=[-1.0], ids=[*other]),
    ]
    write(lake / "a.parquet", logs)
    result = prepared(tokenizer, lake, cache, logprobs_column="lp", token_ids_column="ids")
    found = {tuple(g.rewards): [x if x is None else x.tolist() for x in g.behaviour_logps] for g in result.train}
    assert found[0.9, 0.2, 0.1] == [[-1.0] * (len(ids) + 1), None, None]
    ends, nothing = found[0.9, 0.1]
    assert nothing is None
    assert ends is not None
    np.testing.assert_array_equal(ends, [-0.5] * len(ids) + [np.nan])
    assert (result.counts.logps_used, result.counts.logps_differ) == (2, 2)


def test_merged_responses_keep_the_same_log_probs_in_any_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = tokenizer("fox")["input_ids"]
    rows = [
        row("p", "fox", 0.9, lp=None, ids=None),
        row("p", "fox", 0.7, lp=[-1.0] * len(ids), ids=ids),
        row("p", "fox", 0.7, lp=[-2.0] * len(ids), ids=ids),
        row("p", "dog", 0.1, lp=None, ids=None),
    ]
    results = []
    for number, some in enumerate((rows, rows[::-1], rows[2:] + rows[:2])):
        write(tmp_path / f"{number}/a.parquet", some)
        data: dict[str, Any] = {"logprobs_column": "lp", "token_ids_column": "ids"}
        results.append(repr(contents(prepared(tokenizer, tmp_path / str(number), tmp_path / f"c{number}", **data))))
    assert len(set(results)) == 1
    assert "[-1.0" in results[0] or "[-2.0" in results[0]  # a recorded one wins over none


def test_log_probs_need_their_token_ids(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    write(lake / "a.parquet", [row("p", "a", 0.9, lp=[-1.0]), row("p", "b", 0.1, lp=[-1.0])])
    with pytest.raises(ConfigError, match="token_ids_column None; expected both or neither"):
        prepared(tokenizer, lake, cache, logprobs_column="lp")


def test_everything_too_long_ends_with_the_table(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    write(lake / "a.parquet", group("p", 0.9, 0.1))
    with pytest.raises(NoGroupLeft) as refused:
        prepared(tokenizer, lake, cache, max_length=1)
    assert refused.value.exit_code == 64
    assert "dropped: too long" in refused.value.table


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer can be loaded"),
        ({"tokenizer.json": "{"}, "no tokenizer can be loaded"),
        ({"tokenizer_config.json": "{}"}, "no tokenizer can be loaded"),
    ],
    ids=["empty", "torn", "configuration alone"],
)
def test_folders_without_a_tokenizer(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=message) as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    copy = load_tokenizer(tiny_model(tmp_path / "a"))
    copy.eos_token = None
    copy.save_pretrained(tmp_path / "b")
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path / "b")
