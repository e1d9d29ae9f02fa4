"""GRPO or DPO: the user's four situations, each decided by one number, and a fixed order in which they count.

    situation            speaks for   the traces are in it where
    various responses    GRPO         a prompt's responses have at least VARIOUS different rewards (median)
    clear preference     DPO          at least CLEAR of the usable prompts make a pair
    noisy labels         GRPO         at least NOISY of the labels contradict each other
    quick prototype      DPO          there are fewer than `quick_prompts()` training prompts

First what rules a method out, then what spoils it, then what it costs:

    1. no training prompt makes a pair       -> GRPO: DPO has nothing to train on
    2. noisy labels                          -> GRPO: a rank bears noise that a threshold does not
    3. no clear preference                   -> GRPO: DPO would leave out most prompts
    4. not various                           -> DPO: a pair says all that there is
    5. quick prototype                       -> DPO: few prompts, little to tune
    6. otherwise                             -> GRPO: many prompts, and ranks that pairs would not use
"""

from __future__ import annotations

from typing import Any

from entrypoint.conf import GrpoTrain

Section = dict[str, Any]

VARIOUS = 3.0  # levels: two are a pair, a ranking says more from three on
CLEAR = 0.5  # with less, DPO would train on the smaller part of the prompts that GRPO can use
NOISY = 0.25  # of pairs ordered differently: half of the way from agreement, 0, to two coins, 0.5
EVIDENCE = 30  # pairs, or copies, below which a share of them says nothing: its standard error is near 0.1
MANY_EPOCHS = 10  # more passes over the same traces are seldom meant: a run warns of them


def quick_prompts() -> int:
    """Training prompts that the steps which GRPO makes by default visit MANY_EPOCHS times."""
    usual = GrpoTrain()
    return (usual.max_steps or 0) * usual.batch_size // MANY_EPOCHS


def recommend(noise: Section, pairs: Section, steps: Section) -> Section:
    """The method, why, and the user's table with its numbers; the arguments are the report's sections."""
    table = {
        "various responses": _various(noise),
        "clear preference": _clear(pairs),
        "noisy labels": _noisy(noise),
        "quick prototype": _quick(steps),
    }
    method, reason = _decide({name: row["fits"] for name, row in table.items()}, table, steps)
    return {"method": method, "reason": reason, "table": [{"situation": name, **row} for name, row in table.items()]}


def _decide(fits: dict[str, bool | None], table: dict[str, Section], steps: Section) -> tuple[str, str]:
    numbers = {name: row["number"] for name, row in table.items()}
    if not steps["dpo"]["units"]:
        return "grpo", "no training prompt makes a pair, so DPO has nothing to train on"
    if fits["noisy labels"]:
        return "grpo", f"the labels are noisy ({numbers['noisy labels']}), and ranks bear that better than thresholds"
    if not fits["clear preference"]:
        return "grpo", f"DPO would leave out most prompts: {numbers['clear preference']}"
    if not fits["various responses"]:
        return "dpo", f"preferences are clear, and pairs say all there is ({numbers['various responses']})"
    if fits["quick prototype"]:
        return "dpo", f"preferences are clear, and the traces are few: {numbers['quick prototype']}"
    return "grpo", f"prompts are many, and ranks say more than pairs: {numbers['various responses']}"


def _various(noise: Section) -> Section:
    value = noise["levels"]
    words = f"{value:g} different rewards a prompt (median)"
    return _row("grpo", value, VARIOUS, value >= VARIOUS, words, f"at least {VARIOUS:g}")


def _clear(pairs: Section) -> Section:
    value = pairs["share"]
    words = f"{100 * value:.1f} % of usable prompts make a good/bad pair"
    return _row("dpo", value, CLEAR, value >= CLEAR, words, f"at least {100 * CLEAR:.0f} %")


def _noisy(noise: Section) -> Section:
    """By the two scores behind the reward; where they don't say it, by responses that were labelled more than once."""
    if noise["ordered_pairs"] >= EVIDENCE:
        value = noise["disordered"]
        words = f"the two scores order {100 * value:.1f} % of response pairs differently"
    elif noise["duplicated"] >= EVIDENCE:
        value = round(noise["far_apart"] / noise["duplicated"], 6)
        words = f"{100 * value:.1f} % of responses labelled again got another reward"
    else:
        return _row("grpo", None, NOISY, None, "too few responses have two labels to tell", f"at least {EVIDENCE}")
    return _row("grpo", value, NOISY, value >= NOISY, words, f"at least {100 * NOISY:.0f} %")


def _quick(steps: Section) -> Section:
    value, limit = steps["grpo"]["units"], quick_prompts()
    return _row("dpo", value, limit, value < limit, f"{value:,} training prompts", f"fewer than {limit:,}")


def _row(favours: str, value: Any, threshold: float, fits: bool | None, number: str, needs: str) -> Section:
    """`fits` is None where the traces don't say it."""
    return {"favours": favours, "fits": fits, "value": value, "threshold": threshold, "number": number, "needs": needs}
