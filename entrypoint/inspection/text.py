"""A report as one page of text. It computes nothing: every number is the report's."""

from __future__ import annotations

import textwrap
from typing import Any

from entrypoint.data.report import Counts
from entrypoint.inspection.statistics import NEAR

Section = dict[str, Any]

WIDTH = 120  # characters of a line
LABEL = 16  # characters of it
SOURCES = {
    "tokenizer": "counted by the model's tokenizer",
    "token_count": "estimated: responses from the column token_count, prompts at as many bytes a token",
    "bytes": "estimated at 4 bytes a token; model.path=… counts",
}


def text(report: Section) -> str:
    """The report, at most 45 lines."""
    parts = [
        _traces(report["traces"]),
        Counts.from_dict(report["rows"]).text().split("\n"),
        [
            *_groups(report["groups"]),
            *_rewards(report["rewards"], report["thresholds"]),
            *_pairs(report["pairs"]),
            *_noise(report["noise"]),
            _line("Length bias", _bias(report["length_bias"])),
            *_tokens(report["tokens"]),
            *_steps(report["steps"]),
        ],
        _advice(report["recommendation"]),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _line(label: str, value: str) -> str:
    return f"{label:<{LABEL}}{value}"


def _traces(traces: Section) -> list[str]:
    days = f", {traces['first_day']} to {traces['last_day']}" if traces["first_day"] else ""
    folders = ", ".join(f"{key} ({number})" for key, number in traces["partitions"].items())
    parted = f", partitioned by {folders}" if folders else ""
    models = sorted(traces["models"].items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{name} ({rows:,} rows)" for name, rows in models[:3])
    more = f" and {len(models) - 3} more" if len(models) > 3 else ""
    lines = [_line("Traces", ", ".join(traces["path"][:3]) + (", …" if len(traces["path"]) > 3 else ""))]
    files = f"{traces['files']:,} file{'' if traces['files'] == 1 else 's'}"
    lines.append(_line("", f"{files}, {_size(traces['bytes'])}{days}{parted}"))
    return [*lines, _line("Sampled from", named + more)] if named else lines


def _groups(groups: Section) -> list[str]:
    sizes, bins = groups["sizes"], groups["histogram"]
    return [
        _line(
            "Prompts",
            f"{groups['prompts']:,}, of which {groups['usable']:,} can be trained on; responses a prompt: "
            f"{_number(sizes['min'])} to {_number(sizes['max'])}, median {_number(sizes['median'])}, "
            f"mean {_number(sizes['mean'])}",
        ),
        _line("", "with so many responses:   " + "   ".join(f"{name}: {number:,}" for name, number in bins.items())),
        _line(
            "",
            f"reward spread within a prompt: std {_number(groups['mean_std'])} on average;"
            f" none in {_share(groups['without_spread'])}",
        ),
    ]


def _rewards(rewards: Section, thresholds: Section) -> list[str]:
    points = "   ".join(f"{name} {value:.3f}" for name, value in rewards["quantiles"].items())
    shares = (
        f"{_share(rewards['chosen'])} good (>= {thresholds['chosen']:g}), "
        f"{_share(rewards['rejected'])} bad (< {thresholds['rejected']:g})"
    )
    return [_line("Rewards", f"mean {rewards['mean']:.3f}   {points}"), _line("", shares)]


def _pairs(pairs: Section) -> list[str]:
    numbers = ", ".join(f"{number:,} {pairing}" for pairing, number in pairs["by_pairing"].items())
    where = f"{_share(pairs['share'])} of usable prompts make one"
    return [_line("Good/bad pairs", f"{where}; at most {pairs['per_prompt']} each: {numbers}")]


def _noise(noise: Section) -> list[str]:
    scores = "no response has both ragas_reward and judge_score"
    if noise["scored"]:
        scores = (
            f"ragas_reward and judge_score: correlation {_number(noise['correlation'])}, mean difference "
            f"{_number(noise['mean_difference'])}, order {_share(noise['disordered'])} of pairs differently"
        )
    again = (
        f"{noise['conflicting']:,} of {noise['duplicated']:,} duplicated responses have different rewards; "
        f"{_share(noise['near_ties'])} of neighbouring rewards are near-ties (< {NEAR:g})"
    )
    return [_line("Label noise", scores), _line("", again)]


def _bias(bias: Section) -> str:
    found = f"{_number(bias['overall'])} overall, {_number(bias['within_prompts'])} within prompts"
    return f"correlation of a response's length with its reward: {found}"


def _tokens(tokens: Section) -> list[str]:
    scope = "" if tokens["complete"] else f", of {tokens['responses']:,} responses"
    dropped = tokens["source"] == "tokenizer" and tokens["complete"]
    lines = [_line("Tokens", SOURCES[tokens["source"]] + scope)]
    for name in ("prompt", "response"):
        found = tokens[name]
        points = "   ".join(f"{key} {_count(found[key])}" for key in ("mean", "median", "p95", "max"))
        lines.append(_line("", f"{name + 's':<10} {points}"))
    ratio = f"; prompt : response = 1 : {_number(tokens['response_per_prompt'])}"
    long = f"{_share(tokens['over_max_length'])} longer together than train.max_length={tokens['max_length']}"
    return [*lines, _line("", long + ("" if dropped else " (not in the table above)") + ratio)]


def _steps(steps: Section) -> list[str]:
    lines = []
    for method, word in (("grpo", "prompts"), ("dpo", "pairs")):
        found = steps[method]
        means = f"num_epochs={found['num_epochs']:g} means {found['steps']:,} steps"
        if found["max_steps"]:
            means = f"max_steps={found['max_steps']} means {_number(found['epochs'])} epochs"
        about = (
            f"{found['units']:,} training {word}, {found['batch_size']} a step: {found['steps_per_epoch']:,} an epoch"
        )
        lines.append(_line("Steps" if method == "grpo" else "", f"{method.upper():<6}{about}; {means}"))
    return lines


def _advice(advice: Section) -> list[str]:
    lines = ["Which method do these traces suit?"]
    for row in advice["table"]:
        fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
        words = f"{row['number']}; needs {row['needs']}"
        lines.append(f"  {row['situation']:<18} -> {row['favours'].upper():<5} {fits:<4} {words}")
    reason = f"Recommended: method={advice['method']}. {advice['reason'][0].upper()}{advice['reason'][1:]}."
    return [*lines, *textwrap.wrap(reason, WIDTH, subsequent_indent="  ")]


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    """Two digits behind the point, none of a whole number; never a negative zero."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.2f}".replace("-0.00", "0.00")


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
