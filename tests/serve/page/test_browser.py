"""The page as a person uses it, in a real browser over a server whose model is scripted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOOLS = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}])
CALL = (
    "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    '{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>'
)
LONG = "One two three four five six seven eight nine ten. " * 40
SECONDS = float(os.environ.get("PAGE_S", "3"))  # of the flood of states; 600 was run by hand


def script(name: str) -> str:
    """A script beside this file, without its heading."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8").partition("\n")[2]


def ask(page: Any, text: str) -> None:
    page.fill(".composer textarea", text)
    page.keyboard.press("Enter")


def answer(page: Any, text: str, *, nth: int = -1) -> None:
    page.locator(".message.assistant .text").nth(nth).filter(has_text=text).wait_for()


def test_a_chat_with_a_tool_call_and_figures(
    live: Callable[..., Any], playing: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    engine = playing(CALL, "It snows in **Oslo**.", cached_tokens=5, delay_s=0.002)
    page = visit(live(engine).url)
    page.click("text=Settings")
    page.fill("#set-tools", "no JSON")
    page.click("dialog .primary")
    page.wait_for_selector(".notice:has-text('no JSON list')")
    page.fill("#set-tools", TOOLS)
    page.fill("#set-system", "Be brief.")
    page.fill("#set-temperature", "0.5")
    page.click("dialog .primary")
    ask(page, "Weather?")
    page.wait_for_selector(".call:has-text('weather')")
    page.wait_for_selector('.call pre:has-text(\'"city": "Oslo"\')')
    page.fill(".results textarea", "-3, snow")
    page.click("text=Send results")
    answer(page, "It snows in Oslo.")
    page.wait_for_selector(".text strong:has-text('Oslo')")
    page.wait_for_selector(".figures:has-text('tokens/s'):has-text('first token'):has-text('cached 5')")
    prompt = engine.voice.tokenizer.decode(engine.requests[-1].prompt_ids)
    assert "Be brief." in prompt and "-3, snow" in prompt and engine.requests[-1].sampling.temperature == 0.5


def test_thoughts_are_folded_and_timed(
    live: Callable[..., Any], saying: Callable[..., Any], thinker: Any, visit: Callable[..., Any]
) -> None:
    page = visit(live(saying("Let me see.</think>Yes.", by=thinker)).url)
    ask(page, "Well?")
    answer(page, "Yes.")
    page.wait_for_selector("summary:has-text('Thought for')")
    assert not page.locator(".thoughts-text").is_visible()
    page.click("summary:has-text('Thought for')")
    assert page.locator(".thoughts-text").inner_text() == "Let me see."


def test_stop_ends_the_answer_on_the_server_too(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    engine = saying(LONG, delay_s=0.02)
    page = visit(live(engine).url)
    ask(page, "Count")
    answer(page, "three")
    page.click("text=Stop")
    page.wait_for_selector(".note:has-text('Stopped.')")
    deadline = time.monotonic() + 10
    while not engine.cancelled:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_edits_and_other_answers_are_branches(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    engine = saying("First.")
    page = visit(live(engine).url)
    ask(page, "A?")
    answer(page, "First.")
    engine.script = lambda request: engine.voice.ids("Second.")
    page.click("text=Again")
    answer(page, "Second.")
    page.wait_for_selector(".versions:has-text('2/2')")
    page.click("[aria-label='Previous version']")
    answer(page, "First.")
    page.click(".message.user >> text=Edit")
    page.fill("textarea.edit", "B?")
    page.click(".message.user form .primary")
    page.wait_for_selector(".message.user .versions:has-text('2/2')")
    answer(page, "Second.")
    page.click(".message.user [aria-label='Previous version']")
    page.wait_for_selector(".message.user .plain:has-text('A?')")
    answer(page, "First.")


def test_a_reload_in_mid_answer_loses_nothing_that_was_shown(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    engine = saying(LONG, delay_s=0.02)
    page = visit(live(engine).url)
    ask(page, "Count")
    answer(page, "ten. One")
    shown = page.locator(".message.assistant .text").inner_text().strip()
    page.reload()
    page.wait_for_selector(".note:has-text('Broke off here.')")
    kept = page.locator(".message.assistant .text").inner_text()
    assert kept.startswith(shown)
    engine.delay_s = 0
    engine.script = lambda request: engine.voice.ids(" And the rest.")
    page.click("text=Go on")
    answer(page, "And the rest.")
    assert page.locator(".message.assistant .text").inner_text().startswith(shown)
    assert engine.voice.tokenizer.decode(engine.requests[-1].prompt_ids).rstrip().endswith(kept.rstrip())


def test_an_error_is_in_the_server_s_own_words_and_what_came_before_it_stays(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    page = visit(live(saying("Half of it and more.", break_at=3)).url)
    ask(page, "Well?")
    page.wait_for_selector(".note.bad:has-text('stage 1 died')")
    assert page.locator(".message.assistant .text").inner_text().strip() != ""
    page.fill(".composer textarea", "x" * 200_000)
    page.click(".composer >> text=Send")
    page.wait_for_selector(".note.bad:has-text('context')")


def test_conversations_are_kept_exported_and_imported(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any], tmp_path: Path
) -> None:
    server = live(saying("Kept."))
    page = visit(server.url)
    ask(page, "Keep me")
    answer(page, "Kept.")
    page.wait_for_selector("text=Again")
    with page.expect_download() as download:
        page.click("text=Export all")
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    page.click("text=New conversation")
    assert page.locator(".message").count() == 0
    page.on("dialog", lambda dialog: dialog.accept())
    page.click(".list .title:has-text('Keep me')")
    page.click("text=Delete")
    page.wait_for_selector(".list:not(:has-text('Keep me'))")
    page.set_input_files(".side input[type=file]", file)
    answer(page, "Kept.")
    page.reload()
    answer(page, "Kept.")
    broken = tmp_path / "broken.json"
    broken.write_text('{"conversations": [{"id": 1}]}')
    page.set_input_files(".side input[type=file]", broken)
    page.wait_for_selector(".notice:has-text('no conversation')")


def test_pictures_are_pasted_dropped_and_sent(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any], browser: Any
) -> None:
    url = live(saying("A red dot.")).url
    page = visit(url)
    about = {**json.loads(page.evaluate("fetch('/v1/page').then(r => r.text())")), "pictures": True}
    sent: list[Any] = []
    page.route("**/v1/page", lambda route: route.fulfill(json=about))
    page.route(
        "**/v1/chat/completions",
        lambda route: (sent.append(route.request.post_data_json), route.continue_())[1],
    )
    page.reload()
    page.wait_for_selector(".composer >> text=Add pictures")
    for event, target in (("paste", "textarea"), ("drop", "")):
        page.evaluate(
            script("attach.js"),
            [event, target],
        )
    page.wait_for_selector(".thumb >> nth=1")
    page.click("[aria-label='Remove picture 2']")
    ask(page, "What is it?")
    page.wait_for_selector(".message.user .pictures img")
    page.wait_for_selector(".note.bad:has-text('images are not supported')")  # this server has no tower: its words
    (picture, text) = sent[0]["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,") and text["text"] == "What is it?"


def test_a_stage_is_seen_to_die_and_to_come_back(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    engine = saying()
    page = visit(f"{live(engine).url}/#/cluster")
    page.wait_for_selector(".badge.ready >> nth=1")
    page.wait_for_selector(".status.good")
    engine.stage_states = ("ready", "dead")
    page.wait_for_selector(".badge.dead")
    page.wait_for_selector(".note.bad:has-text('exit code 137')")
    page.wait_for_selector(".status.bad:has-text('stage 1 is dead')")
    engine.stage_states = ("ready", "loading")
    page.wait_for_selector(".badge.loading")
    engine.stage_states = ("ready", "ready")
    page.wait_for_selector(".badge.ready >> nth=1")
    page.wait_for_selector(".status.good")


def test_a_plan_is_made_and_its_picture_kept(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any], tmp_path: Path
) -> None:
    page = visit(f"{live(saying()).url}/#/planner")
    page.click("form .primary")
    page.wait_for_selector(".plan-picture")
    assert page.evaluate("document.querySelector('.plan-picture').naturalWidth") > 0
    assert "exo-kimi plan --model kimi-k2-thinking" in page.locator("main").inner_text()
    for button, beginning in (("Keep the picture", "<svg"), ("Keep the plan", "{")):
        with page.expect_download() as download:
            page.click(f"text={button}")
        download.value.save_as(tmp_path / "kept")
        assert (tmp_path / "kept").read_text().startswith(beginning)
    page.fill("#plan-ssd", "4.5")
    page.check("#plan-stream")
    page.click("form .primary")
    page.wait_for_selector("pre:has-text('--ssd 4.5GB/s')")
    (tmp_path / "own.toml").write_text("version = 9")
    page.set_input_files("#plan-hits", tmp_path / "own.toml")
    page.click("form .primary")
    page.wait_for_selector("pre:has-text('hit rates of another version')")
    page.set_input_files("#plan-hits", [])
    page.uncheck("#plan-stream")
    page.click("text=Add a machine")
    page.select_option("[aria-label='Machine 3']", "m4-max")
    page.select_option("[aria-label='Memory 3']", "128")
    page.select_option("#plan-model", "kimi-k2.6")
    page.fill("#plan-context", "400000")
    page.click("form .primary")
    page.wait_for_selector(".note.bad:has-text('context')")


def test_the_key_is_asked_once(live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any]) -> None:
    page = visit(live(saying("Open."), api_key="sesame").url)
    page.fill("dialog input", "wrong")
    page.click("dialog .primary")
    page.wait_for_selector("dialog:has-text('not right')")
    page.fill("dialog input", "sesame")
    page.click("dialog .primary")
    ask(page, "Hello")
    answer(page, "Open.")
    page.reload()
    answer(page, "Open.")
    page.click("nav >> text=Cluster")
    page.wait_for_selector(".badge.ready")
    assert page.locator("dialog").count() == 0
    page.click("text=Forget the key")
    page.wait_for_selector("dialog input")
    page.click("dialog >> text=Cancel")
    page.wait_for_selector("[role=alert]:has-text('API key')")


HOSTILE = r"""<script>document.title = 'owned'</script><img src=x onerror="document.title='owned'">
[go](javascript:document.title='owned') [far](https://evil.example/x) ![pixel](https://evil.example/pixel.png)
<iframe src="https://evil.example"></iframe> <a href="//evil.example">b</a> https://evil.example/bare
$\href{javascript:alert(1)}{x}$ $$\style{background:url(https://evil.example)}{y}$$
| <b>a</b> | `<i>` |
|---|---|
| <svg onload=alert(1)> | 1 |

```html
<script>alert(1)</script>
```"""


def test_an_answer_full_of_html_links_and_scripts_stays_text(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    url = live(saying(HOSTILE)).url
    page = visit(url)
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    ask(page, "Be evil")
    page.wait_for_selector("text=Again")
    text = page.locator(".message.assistant .text").inner_text()
    for told in ("<script>document.title", "<img src=x", "<iframe", "<svg onload", "javascript:document", "<b>a</b>"):
        assert told in text
    assert page.title() == "tiny-kimi · exo-kimi"
    inside = page.locator(".message.assistant .text")
    assert inside.locator("script, img, iframe, svg, style, [onerror], [onload], [style]").count() == 0
    links = inside.locator("a").evaluate_all("all => all.map(a => [a.protocol, a.rel, a.target])")
    assert links and all(link == ["https:", "noopener noreferrer nofollow", "_blank"] for link in links)
    assert {address.startswith((url, "data:", "blob:")) for address in page.asked} == {True}


def test_every_view_can_be_read_by_all(
    live: Callable[..., Any], playing: Callable[..., Any], visit: Callable[..., Any], axe: str
) -> None:
    engine = playing(
        "# Title\n\n- a\n- b\n\n```py\nx = 1\n```\n\n| a | b |\n|---|---|\n| 1 | $x^2$ |\n\n" + CALL, "Done."
    )
    url = live(engine).url
    for theme in ("light", "dark"):
        page = visit(url, color_scheme=theme, bypass_csp=True)
        page.click("text=Settings")
        page.fill("#set-tools", TOOLS)
        found = axe_findings(page, axe, f"settings, {theme}")
        page.click("dialog .primary")
        ask(page, "Weather?")
        page.wait_for_selector("text=Again")
        for view, ready in (("chat", "text=Again"), ("cluster", ".badge.ready"), ("planner", "#plan-model")):
            page.goto(f"{url}/#/{view}")
            page.wait_for_selector(ready)
            if view == "planner":
                page.click("form .primary")
                page.wait_for_selector(".plan-picture")
            for width in (360, 800, 1280):
                page.set_viewport_size({"width": width, "height": 800})
                found += axe_findings(page, axe, f"{view}, {theme}, {width}")
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                    f"{view} is wider than {width}"
                )
        assert found == []


def axe_findings(page: Any, axe: str, where: str) -> list[str]:
    """Every serious finding, with the place."""
    page.evaluate(axe)
    violations = page.evaluate(
        "axe.run().then(r => r.violations.filter(v => ['serious', 'critical'].includes(v.impact)))"
    )
    return [f"{where}: {each['id']}: {node['html'][:200]}" for each in violations for node in each["nodes"]]


def test_every_language_has_every_text(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    url = live(saying("はい。")).url
    page = visit(url)
    keys = page.evaluate(
        """async () => {
            const all = await Promise.all(['en', 'ja', 'zh'].map((tag) => import(`/page/words/${tag}.js`)));
            return all.map((words) => Object.entries(words.default).filter(([, text]) => text).map(([key]) => key));
        }"""
    )
    assert keys[0] == keys[1] == keys[2]
    for locale, send in (("ja-JP", "送信"), ("zh-CN", "发送"), ("fr-FR", "Send")):
        spoken = visit(url, locale=locale)
        spoken.wait_for_selector(f"button:has-text('{send}')")
    spoken.select_option("[aria-label=Language]", "ja")
    spoken.wait_for_selector("button:has-text('送信')")
    assert spoken.evaluate("document.documentElement.lang") == "ja"


def test_the_keyboard_is_enough(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    page = visit(live(saying("Typed.")).url)
    page.wait_for_selector(".composer textarea:focus")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answer(page, "Typed.")
    assert page.locator(".message.user .plain").inner_text() == "one\ntwo"
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.textContent.trim().slice(0, 20)"))
    assert {"Chat", "Cluster", "Planner", "Again", "Edit", "Settings", "Send"} <= seen


def test_two_hundred_states_a_second_leave_the_page_as_large_and_the_last_one_shown(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    page = visit(f"{live(saying()).url}/#/cluster")
    page.wait_for_selector(".badge.ready")
    client = page.context.new_cdp_session(page)

    def heap_bytes() -> int:
        client.send("HeapProfiler.collectGarbage")
        return int(client.send("Runtime.getHeapUsage")["usedSize"])

    page.evaluate(script("flood.js"), 2)  # what is made once is there then
    before_bytes = heap_bytes()
    done = page.evaluate(script("flood.js"), SECONDS)
    grown_bytes = heap_bytes() - before_bytes
    assert done["sent"] > 100 * SECONDS
    assert f"event {done['sent']}" in done["text"] and f"{done['sent']:,} + 0 /" in done["text"]
    assert max(done["nodes"]) == min(done["nodes"])
    assert grown_bytes < 2**17, f"{grown_bytes} bytes more after {done['sent']} states"


MARKDOWN = [
    ("a **b** *c* ~~d~~ `e*f*`", "<p>a <strong>b</strong> <em>c</em> <del>d</del> <code>e*f*</code></p>"),
    ("snake_case_name and 2*3*4", "<p>snake_case_name and 2<em>3</em>4</p>"),
    ("# One\n## Two", "<h3>One</h3><h4>Two</h4>"),
    ("1. a\n2. b\n   - c", "<ol><li><span>a</span></li><li><span>b</span><ul><li><span>c</span></li></ul></li></ol>"),
    ("- [x] done\n- [ ] open", "<ul><li><span>☑ done</span></li><li><span>☐ open</span></li></ul>"),
    ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    ("a\nb", "<p>a<br>b</p>"),
    ("a \\*b\\* <c>", "<p>a *b* &lt;c&gt;</p>"),
    ("costs $5 and $6", "<p>costs $5 and $6</p>"),
]


def test_markdown_becomes_elements(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    page = visit(live(saying()).url)
    made = page.evaluate(
        """async (texts) => {
            const { MarkdownView } = await import('/page/markdown.js');
            const words = (await import('/page/words/en.js')).default;
            return texts.map((text) => {
                const whole = document.createElement('div');
                new MarkdownView(whole, words).show(text);
                const grown = document.createElement('div');
                const view = new MarkdownView(grown, words);
                for (let end = 1; end <= text.length; end += 1) view.show(text.slice(0, end));
                return [whole.innerHTML, grown.innerHTML];
            });
        }""",
        [text for text, _ in MARKDOWN],
    )
    for (text, expected), (whole, grown) in zip(MARKDOWN, made, strict=True):
        assert whole == expected, text
        assert grown == whole, f"{text!r} is another when it grows"


FORMULAS = {
    r"\frac{a}{b}": "mfrac",
    r"x_i^{2}": "msubsup",
    r"\sqrt[3]{x}": "mroot",
    r"\sum_{i=0}^n i": "munderover",
    r"\int_0^1 f": "msubsup",
    r"\begin{pmatrix} a & b \\ c & d \end{pmatrix}": "mtable",
    r"\left( \frac{1}{2} \right]": "mo",
    r"\mathbb{R} \text{ if } \alpha \le 3.14": "mtext",
    r"\hat{x} \binom{n}{k} \operatorname{softmax}": "mover",
    r"f'(x) = \lim_{h \to 0} g": "munder",
}


def test_formulas_are_mathml_and_unknown_ones_stay_as_they_were_written(
    live: Callable[..., Any], saying: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    page = visit(live(saying()).url)
    show = "async (tex) => (await import('/page/tex.js')).math(tex, false).outerHTML"
    for tex, tag in FORMULAS.items():
        made = page.evaluate(show, tex)
        assert made.startswith("<math") and f"<{tag}" in made, tex
    for tex in (r"\unknown{x}", r"\frac{a}", "{a", r"\begin{x}", "a & b", "{" * 100):
        made = page.evaluate(show, tex)
        assert made.startswith('<code class="tex">'), tex
