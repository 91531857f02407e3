"""Prompts of six domains with a right reply each, in the project's own words, made by seeded generators.

A reply is there so that a text can be read to its end by two models; whether a model would say the same is not judged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from exo_kimi.compress.texts.tool_requests import TOOLS, free, needing
from exo_kimi.errors import UsageError

LEDGER_LINES = 160
"""Lines of a long text: some 3,000 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPrompt:
    """A conversation with its reply, and what it is about.

    Args:
        domain: one of `DOMAINS`.
        messages: the last of them the reply.
        tools: declared.
        needs_call: whether the reply should call one.
    """

    domain: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    needs_call: bool = False


def domain_prompts(count: int, seed: int, domains: tuple[str, ...] = ()) -> list[DomainPrompt]:
    """At most `count` different prompts of each domain, the same for the same seed.

    Args:
        count: of each.
        seed: of the generators.
        domains: which; all when not given.

    Raises:
        UsageError: no such domain.
    """
    unknown = [domain for domain in domains if domain not in _MAKERS]
    if unknown:
        raise UsageError("no such domain of prompts", expected=", ".join(DOMAINS), found=unknown[0])
    prompts: list[DomainPrompt] = []
    for domain in domains or DOMAINS:
        rng = Random(f"{domain} {seed}")
        made: dict[str, DomainPrompt] = {}
        for _ in range(20 * count):
            prompt = _MAKERS[domain](rng)
            made.setdefault(str(prompt.messages[0]["content"]), prompt)
            if len(made) == count:
                break
        prompts += made.values()
    return prompts


def _single(domain: str, question: str, reply: str) -> DomainPrompt:
    return DomainPrompt(
        domain=domain,
        messages=[{"role": "user", "content": question}, {"role": "assistant", "content": reply}],
    )


def _maths(rng: Random) -> DomainPrompt:
    name, other = rng.sample(("Mira", "Jonas", "Wen", "Amara", "Piet"), 2)
    a, b, c = rng.randint(12, 60), rng.randint(3, 9), rng.randint(2, 11)
    kinds = (
        (
            f"{name} packs {a} boxes with {b} jars each and gives {c} jars to {other}. How many jars are left?",
            f"{a} boxes hold {a} * {b} = {a * b} jars. After giving {c} away, {a * b} - {c} = {a * b - c} are left.\n\n"
            f"**{a * b - c}**",
        ),
        (
            f"A tank holds {a * c} litres and drains {c} litres a minute. After how many minutes is it empty?",
            f"It drains {c} litres each minute, so {a * c} / {c} = {a} minutes.\n\n**{a}**",
        ),
        (
            f"Solve for x: {b}x + {c} = {b * a + c}",
            f"Subtract {c}: {b}x = {b * a}. Divide by {b}: x = {a}.\n\n**x = {a}**",
        ),
        (
            f"A rectangle is {a} cm wide and {b} cm high. What are its area and its perimeter?",
            f"Area: {a} * {b} = {a * b} square centimetres. Perimeter: 2 * ({a} + {b}) = {2 * (a + b)} cm.",
        ),
        (
            f"What is the sum of all whole numbers from {b} to {a + b}?",
            f"There are {a + 1} numbers, and their mean is ({b} + {a + b}) / 2, so the sum is "
            f"{a + 1} * {a + 2 * b} / 2 = {(a + 1) * (a + 2 * b) // 2}.",
        ),
    )
    return _single("maths", *rng.choice(kinds))


def _code(rng: Random) -> DomainPrompt:
    name = rng.choice(("pick", "keep", "scan", "walk", "fold", "tidy"))
    many, limit = rng.choice(("items", "rows", "words", "scores", "cells")), rng.randint(2, 90)
    kinds = (
        (
            f"Write a Python function `{name}_{many}` that keeps the numbers of a list which are above {limit}.",
            f"```python\ndef {name}_{many}({many}: list[int]) -> list[int]:\n"
            f"    return [each for each in {many} if each > {limit}]\n```",
        ),
        (
            f"Write a Python function `{name}_{many}` that splits a list into pieces of {limit}.",
            f"```python\ndef {name}_{many}({many}: list) -> list[list]:\n"
            f"    return [{many}[start : start + {limit}] for start in range(0, len({many}), {limit})]\n```",
        ),
        (
            "This raises an IndexError for short lists. Mend it:\n"
            f"```python\ndef {name}({many}):\n    return {many}[{limit}]\n```",
            f"A list of {limit} or fewer has no such place:\n```python\ndef {name}({many}, default=None):\n"
            f"    return {many}[{limit}] if len({many}) > {limit} else default\n```",
        ),
        (
            f"Write an SQL query for the {limit} largest totals of the table `{many}`, by `customer`.",
            f"```sql\nSELECT customer, SUM(amount) AS total\nFROM {many}\nGROUP BY customer\nORDER BY total DESC\n"
            f"LIMIT {limit};\n```",
        ),
        (
            f"Write a shell line that counts the lines of every `.{name}` file here with more than {limit} of them.",
            f"```sh\nwc -l ./*.{name} | awk '$1 > {limit} && $2 != \"total\"'\n```",
        ),
    )
    return _single("code", *rng.choice(kinds))


def _english(rng: Random) -> DomainPrompt:
    place = rng.choice(("a lighthouse", "a night train", "a small bakery", "an old observatory", "a ferry"))
    who = rng.choice(("the keeper", "a tired doctor", "two sisters", "a retired sailor", "the new apprentice"))
    thing = rng.choice(("a letter without a name", "a broken watch", "a lost dog", "an unpaid bill", "a map"))
    kinds = (
        (
            f"Write three sentences that happen in {place}, with {who} and {thing}.",
            f"It was past midnight in {place} when {who} found {thing}. Nobody had been expected before the morning. "
            "Outside, the rain went on as if nothing had happened.",
        ),
        (
            f"How would {who} explain to a child why {thing} matters? Two sentences.",
            f"Because {thing} belongs to somebody, and somebody is looking for it. "
            "We would want the same if it were ours.",
        ),
        (
            f"Rewrite politely: 'I waited an hour at {place} and nobody told me anything about {thing}.'",
            f"I would have been grateful for a word about {thing} during the hour that I spent waiting at {place}.",
        ),
    )
    return _single("english", *rng.choice(kinds))


def _chinese(rng: Random) -> DomainPrompt:
    place = rng.choice(("北京", "上海", "成都", "西安", "杭州", "广州"))
    season, count = rng.choice(("春天", "夏天", "秋天", "冬天")), rng.randint(2, 9)
    thing = rng.choice(("茶馆", "书店", "公园", "早市", "博物馆"))
    kinds = (
        (
            f"用两句话介绍{place}的{season}。",
            f"{place}的{season}很有自己的味道,街上的人也比平时多。傍晚出门走一走,是最舒服的时候。",
        ),
        (f"我想在{place}找一家{thing},怎么问路?", f"可以说:「请问附近有{thing}吗?走路大概要几分钟?」"),
        (
            f"把下面这句话翻译成英文:我们{count}个人{season}在{place}的一家{thing}见面。",
            f"The {count} of us meet at a place in {place}, in the season that you named: "
            f"{ {'春天': 'spring', '夏天': 'summer', '秋天': 'autumn', '冬天': 'winter'}[season] }.",
        ),
        (
            f"一张{thing}的门票{count * 5}元,{count}个人一共多少钱?",
            f"每张{count * 5}元,{count}个人是{count * 5}×{count}={count * count * 5}元。",
        ),
    )
    return _single("chinese", *rng.choice(kinds))


def _tools(rng: Random) -> DomainPrompt:
    declared = list(TOOLS)
    rng.shuffle(declared)
    if rng.random() < 0.25:
        question = free(rng)
        prompt = _single("tools", question, "I can answer that without a tool.")
        return DomainPrompt(domain="tools", messages=prompt.messages, tools=declared)
    question, (name, arguments) = needing(rng)
    call = {
        "id": f"functions.{name}:0",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    }
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    return DomainPrompt(domain="tools", messages=messages, tools=declared, needs_call=True)


def _long(rng: Random) -> DomainPrompt:
    goods = ("rope", "lamp oil", "salt", "canvas", "nails", "soap", "flour", "copper wire")
    lines = [
        f"{number:03}. day {rng.randint(1, 30)}, {rng.choice(goods)}, {rng.randint(2, 99)} pieces, shelf {rng.randint(1, 40)}"
        for number in range(1, LEDGER_LINES + 1)
    ]
    asked = rng.randint(1, LEDGER_LINES)
    found = lines[asked - 1].partition(". ")[2]
    question = "The ledger of a warehouse:\n" + "\n".join(lines) + f"\n\nWhat does entry {asked:03} say, word for word?"
    return _single("long context", question, f"Entry {asked:03} says: {found}.")


_MAKERS: dict[str, Callable[[Random], DomainPrompt]] = {
    "maths": _maths,
    "code": _code,
    "english": _english,
    "chinese": _chinese,
    "tools": _tools,
    "long context": _long,
}
DOMAINS: tuple[str, ...] = tuple(_MAKERS)
