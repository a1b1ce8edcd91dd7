#!/usr/bin/env python3
"""Tests the chat page of a running `bitnet serve` in headless Chromium.

    apt-get install chromium chromium-driver && python3 -m pip install selenium
    tests/clients/page.py URL [URL ...] [--key KEY] [--screenshots FOLDER] [-k PART_OF_A_TEST'S_NAME]

The servers need one model with a chat template and one without; a single server may have both. The tests do not rely on
what the models say, only that they say something: a model that always ends at once fails them.
"""

import argparse
import json
import pathlib
import re
import sys
import time
import unittest

sys.dont_write_bytecode = True  # Nothing is left beside this file.
import browser
from browser import MODELS, Browser, get
from selenium.common.exceptions import TimeoutException, WebDriverException
from selenium.webdriver.common.keys import Keys

ATTEMPTS = 12  # A model may end an answer at its first token. Then another seed is tried.

# Records, at each change of the page, how long the last answer is while it is being written.
RECORD = """
window.lengths = [];
new MutationObserver(() => {
  const answer = [...document.querySelectorAll('.prose')].at(-1);
  if (answer && document.getElementById('send').title === 'Stop') window.lengths.push(answer.textContent.length);
}).observe(document.getElementById('messages'), { subtree: true, childList: true, characterData: true });
window.said = 0;
new MutationObserver((changes) => (window.said += changes.length)).observe(document.getElementById('live'), { childList: true });
"""
# The boxes of visible controls that stick out of the window, and of all that scrolls sideways without being code.
OUTSIDE = """
const wide = [document.documentElement, document.getElementById('log')].filter((box) => box.scrollWidth > box.clientWidth);
const out = [...document.querySelectorAll('button, a, select, input, textarea, summary')].filter((control) => {
  const box = control.getBoundingClientRect();
  if (control.matches('.skip') || control.closest('.code') || !control.checkVisibility({ visibilityProperty: true })) return false;
  return box.width && (box.left < -0.5 || box.right > innerWidth + 0.5);
});
return [...wide, ...out].map((box) => box.outerHTML.slice(0, 120));
"""
# Contrast (WCAG 2) between the colours of a text and of the box that it is on.
CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const rgb = (colours) => {
  canvas.clearRect(0, 0, 1, 1);
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (colour) => colour.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
return [...document.querySelectorAll(arguments[0])].filter((text) => text.checkVisibility({ visibilityProperty: true }) && text.textContent.trim()).map((text) => {
  const under = [];
  for (let box = text; box; box = box.parentElement) under.unshift(getComputedStyle(box).backgroundColor);
  const back = light(rgb(under)), front = light(rgb([...under, getComputedStyle(text).color]));
  return [(Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05), back, text.outerHTML.slice(0, 80)];
});
"""


class Chat(Browser):
    def test_headers_allow_no_foreign_code(self):
        paths = ["/", "/page/style.css", "/page/app.js"]
        for path in paths:  # Grows by the modules that a module names.
            status, headers, body = get(self.url + path)
            named = ["/page/" + name for name in re.findall(r"from '\./([\w.]+)'", body)]
            paths += [name for name in dict.fromkeys(named) if name not in paths]
            self.assertEqual(200, status, path)
            self.assertNotRegex(body, r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", f"{path} names another server")
        self.assertGreater(len(paths), 5)
        policy = get(self.url + "/")[1]["Content-Security-Policy"]
        for part in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "base-uri 'none'"):
            self.assertIn(part, policy)
        self.assertNotIn("unsafe", policy)

    def test_typing_and_streaming(self):
        self.script(RECORD)
        for attempt in range(ATTEMPTS):
            self.long(attempt)
            self.one("#message").send_keys("first line", Keys.SHIFT, Keys.ENTER, Keys.NULL, "second line")
            self.assertEqual([], self.all(".question"), "Shift+Enter sent the message")
            self.script("window.lengths.length = window.said = 0")
            self.one("#send").click()
            self.finished()
            self.assertEqual("first line\nsecond line", self.texts(".said")[-1])
            lengths = self.script("return window.lengths")
            if len({length for length in lengths if length}) >= 3:
                break
            self.begin()
        else:
            self.fail(f"no answer appeared piece by piece; lengths of the last one: {lengths}")
        # A screen reader hears paragraphs and the end, not each token.
        answer = self.one(".prose").get_attribute("textContent")
        self.assertLess(self.script("return window.said"), min(len(set(lengths)), answer.count("\n") + 6) + 5)
        self.assertRegex(self.one("#live").get_attribute("textContent"), r"complete|cut")

        # What computed it, and how fast.
        self.assertRegex(self.one("summary").text, r"[\d.,]+ tokens/s · [\d,]+ tokens? · \S+")
        self.one("summary").click()
        facts = dict(zip(self.texts("dt"), self.texts("dd")))
        self.assertEqual(self.model, facts["Model"])
        self.assertTrue(facts["Kernels"])
        self.assertRegex(facts["Prompt"], r"^[\d,]+ tokens")

    def test_receipt(self):
        self.ask("A question")
        link = self.one("a.receipt")
        target = link.get_attribute("href")
        self.assertRegex(target, r"/v1/receipts/.+")
        status, _, body = get(target)
        self.assertEqual(200, status)
        json.loads(body)
        link.click()
        self.wait(lambda: self.one("#receipt-text").get_attribute("textContent").startswith("{"))
        self.assertEqual(set(json.loads(body)), set(json.loads(self.one("#receipt-text").get_attribute("textContent"))))
        self.assertTrue(self.one("#receipt-save").get_attribute("href").startswith("blob:"))
        self.one("#receipt .close").click()

    def stop_with(self, stop):
        """Stops an answer while it is being written, and goes on."""
        for attempt in range(ATTEMPTS):
            self.long(attempt)
            self.slow(6000)  # So that even a small model's answer takes seconds.
            self.ask("Tell me everything", finish=False)
            try:
                self.wait(lambda: self.messages()[-1:] not in ([], [""]) and self.running(), 5)
                stop()
                self.wait(lambda: not self.running(), 5)
            except TimeoutException:
                self.assertFalse(self.running(), "the answer was not stopped")
            if "stopped" in self.one("summary").get_attribute("textContent"):
                break
            self.begin()
        else:
            self.fail("every answer ended before it was stopped")
        text = self.messages()[-1]
        self.assertTrue(text)
        request = self.requests()[-1][0]
        self.wait(lambda: self.cancelled(request), 5)
        time.sleep(0.5)
        self.assertEqual(text, self.messages()[-1], "the answer grew after it was stopped")
        self.slow(-1)
        self.set(max_tokens=4)
        self.ask("And now?")
        self.assertEqual(4, len(self.messages()))
        # The model gets what was written of its answer.
        self.assertTrue(self.requests()[-1][1]["messages"][1]["content"])

    def test_stop_with_the_button(self):
        self.stop_with(lambda: self.one("#send").click())

    def test_stop_with_escape(self):
        self.stop_with(lambda: self.driver.switch_to.active_element.send_keys(Keys.ESCAPE))

    def test_reload_keeps_the_conversation(self):
        self.set(temperature=0.5, max_tokens=8, system="Be kind.")
        self.ask("Remember this")
        before = self.messages()
        self.driver.refresh()
        self.ready()
        self.assertEqual(before, self.messages())
        self.assertIn("Be kind.", self.one(".system").text)
        self.assertEqual("0.5", self.one("#temperature").get_attribute("value"))
        # It goes on where it ended, and is in the list of a new page.
        self.ask("And this")
        sent = self.requests()[-1][1]
        self.assertEqual(["system", "user", "assistant", "user"], [message["role"] for message in sent["messages"]])
        before = self.messages()
        self.open("?new")
        self.assertEqual([], self.messages())
        self.one("#list a").click()
        self.wait(lambda: self.messages() == before)
        self.driver.back()
        self.wait(lambda: not self.messages())

    def test_reload_keeps_what_was_written_of_an_answer(self):
        for attempt in range(ATTEMPTS):
            self.long(attempt)
            self.slow(15000)
            self.ask("Tell me everything", finish=False)
            try:
                self.wait(lambda: self.messages()[-1:] not in ([], [""]) and self.running(), 5)
            except TimeoutException:
                self.begin()
                continue
            seen = self.messages()[-1]
            self.script("location.reload()")
            self.slow(-1)
            self.ready()
            if "stopped" in self.one("summary").get_attribute("textContent"):
                break
            self.begin()
        else:
            self.fail("every answer ended before the page was loaded again")
        self.assertFalse(self.running())
        # (Marks of Markdown come and go while an answer grows, so the texts themselves may differ.)
        self.assertGreater(len(self.messages()[-1]), max(0, len(seen) - 16))

    def test_edit(self):
        self.set(max_tokens=8)
        self.ask("First question")
        self.ask("Second question")
        self.assertEqual(4, len(self.messages()))
        self.one(".question .edit").click()
        field = self.one(".editing textarea")
        field.send_keys(" unwanted", Keys.ESCAPE)
        self.wait(lambda: self.texts(".said")[0] == "First question")
        self.one(".question .edit").click()
        field = self.one(".editing textarea")
        field.clear()
        field.send_keys("Better question")
        self.one(".editing .save").click()
        self.wait(lambda: self.texts(".said") == ["Better question"])
        self.finished()
        self.assertEqual(2, len(self.messages()))
        self.assertEqual([{"role": "user", "content": "Better question"}], self.requests()[-1][1]["messages"])

    def test_regenerate(self):
        self.set(max_tokens=24)
        self.ask("A question")
        self.one(".regenerate").click()
        self.wait(lambda: len(self.requests()) == 2)
        self.finished()
        first, second = (body for _, body in self.requests())
        self.assertNotEqual(first.pop("seed"), second.pop("seed"), "without a fixed seed, each answer has its own")
        self.assertEqual(first, second)
        self.assertEqual(2, len(self.messages()))
        # On a CPU, the seed decides.
        self.set(seed=42)
        answers = []
        for count in (3, 4):
            self.one(".regenerate").click()
            self.wait(lambda: len(self.requests()) == count)
            self.finished()
            answers.append(self.messages()[-1])
        self.assertEqual(answers[0], answers[1])

    def test_settings_are_sent(self):
        self.set(temperature=0.25, top_k=7, min_p=0.1, repetition_penalty=1.1, seed=5, max_tokens=6, top_p=7)
        self.assertEqual("true", self.one("#top_p").get_attribute("aria-invalid"))
        self.set(system="Be brief.")
        self.ask("A question")
        body = self.requests()[-1][1]
        self.assertEqual({"role": "system", "content": "Be brief."}, body["messages"][0])
        expected = {"temperature": 0.25, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 5, "max_tokens": 6}
        self.assertEqual(expected, {name: body[name] for name in expected})
        self.assertNotIn("top_p", body, "a value that is out of range was sent")
        self.assertEqual((self.model, True), (body["model"], body["stream"]))
        self.one("#settings-open").click()
        self.one("#settings-reset").click()
        self.one("#settings .close").click()
        self.ask("Another")
        self.assertLessEqual(set(self.requests()[-1][1]), {"model", "messages", "seed", "stream", "stream_options"})

    def test_several_conversations(self):
        self.set(max_tokens=8)
        for name in ("One", "Two", "Three"):
            self.begin()
            self.ask(name)
        self.assertEqual(["Three", "Two", "One"], self.texts("#list a"))
        self.all("#list a")[2].click()
        self.wait(lambda: self.texts(".said") == ["One"])
        self.assertEqual("One", self.one("#list [aria-current]").text)
        # Another tab sees them, and what it deletes is gone here.
        here = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        self.open()
        self.assertEqual(["Three", "Two", "One"], self.texts("#list a"))
        self.driver.execute_script("document.querySelectorAll('#list .remove')[0].click()")
        self.one("#delete-yes").click()
        self.wait(lambda: self.texts("#list a") == ["Two", "One"])
        self.driver.close()
        self.driver.switch_to.window(here)
        self.wait(lambda: self.texts("#list a") == ["Two", "One"])

    def test_keyboard_alone(self):
        self.wait(lambda: self.script("return document.activeElement.id") == "message")
        self.tab_to("#settings-open")
        self.press(Keys.ENTER)
        self.tab_to("#max_tokens")
        self.press("8", Keys.ESCAPE)
        self.wait(lambda: self.script("return document.activeElement.id") == "settings-open")
        self.tab_to("#message")
        self.press("Typed", Keys.ENTER)
        self.finished()
        self.assertEqual("message", self.script("return document.activeElement.id"))
        # All in the order in which it is seen.
        order = [".skip", "#new", "#list a", "#list .rename", "#list .remove", "#model", "#settings-open", "#log"]
        order += [".question .copy", ".question .edit", "summary", "a.receipt", ".answer .facts .copy", ".regenerate", "#message", "#send"]
        self.driver.refresh()
        self.ready()
        self.script("document.querySelector('.skip').focus()")
        place = self.script("window.places = [...document.querySelectorAll('*')]; return places.indexOf(document.activeElement)")
        for _ in range(60):
            order = [selector for selector in order if not self.script("return document.activeElement.matches(arguments[0])", selector)]
            self.tab()
            here = self.script("return places.indexOf(document.activeElement)")
            if here <= place:
                break
            place = here
        self.assertEqual([], order, "Tab does not reach these, in the page's order")
        # Regenerate, edit, rename, delete.
        self.tab_to(".regenerate", backwards=True)
        self.press(Keys.ENTER)
        self.finished()
        self.tab_to(".question .edit", backwards=True)
        self.press(Keys.ENTER)
        self.press(" again", Keys.ENTER)
        self.wait(lambda: self.texts(".said") == ["Typed again"])
        self.finished()
        self.tab_to("#list .rename", backwards=True)
        self.press(Keys.ENTER)
        self.press(Keys.CONTROL, "a", Keys.NULL, "My name", Keys.ENTER)
        self.wait(lambda: self.texts("#list a") == ["My name"])
        self.assertIn("rename", self.script("return document.activeElement.className"), "the focus is lost")
        self.tab_to("#list .remove")
        self.press(Keys.ENTER)
        self.tab_to("#delete-yes")
        self.press(Keys.ENTER)
        self.wait(lambda: not self.all("#list a") and not self.messages())
        self.assertNotEqual("BODY", self.script("return document.activeElement.tagName"), "the focus is lost")

    def test_every_control_has_a_name(self):
        self.named()
        self.set(max_tokens=8, system="Be kind.")
        self.ask("A question with `code`")
        self.script("document.querySelector('summary').click()")
        found = self.named()
        self.assertLessEqual({("textbox", "Message"), ("button", "Send"), ("combobox", "Model"), ("button", "Settings")}, set(found))
        self.assertLessEqual({("article", "Your message"), ("article", "Answer"), ("log", "Messages")}, set(found))
        self.assertIn(("button", "Rename “A question with `code`”"), found)
        self.one(".question .edit").click()
        self.assertIn(("textbox", "Edit your message"), self.named())
        self.press(Keys.ESCAPE)
        self.script("document.querySelector('#list .rename').click()")
        self.assertIn(("textbox", "Name of the conversation"), self.named())
        self.press(Keys.ESCAPE)
        for dialog in ("settings", "receipt", "key", "delete"):
            self.script("document.getElementById(arguments[0]).showModal()", dialog)
            found = self.named()
            self.assertIn("dialog", {role for role, _ in found}, dialog)
            self.script("document.getElementById(arguments[0]).close()", dialog)
        self.size(390, 844)
        self.assertIn(("button", "Conversations"), self.named())
        self.assertEqual("polite", self.one("#live").get_attribute("aria-live"))

    def test_light_and_dark(self):
        self.set(max_tokens=8, system="Be kind.")
        self.ask("A question")
        self.script("document.querySelector('summary').click()")
        parts = "#side p, #side a, button, header select, .said, .prose, .system, summary, dt, dd, a, .hint, h2, h3, label, .field p, .intro"
        for scheme, dark in (("light", False), ("dark", True)):
            self.emulate("prefers-color-scheme", scheme)
            for dialog in (False, True):
                if dialog:
                    self.one("#settings-open").click()
                measured = self.script(CONTRAST, parts)
                self.assertGreater(len(measured), 10)
                self.assertEqual([], [(round(contrast, 2), text) for contrast, _, text in measured if contrast < 4.5], scheme)
                paper = self.script(CONTRAST, "body")[0][1]
                self.assertTrue(paper < 0.05 if dark else paper > 0.8, f"{scheme}: the page's luminance is {paper}")
            self.picture(f"settings_{scheme}")
            self.one("#settings .close").click()
        moving = "return getComputedStyle(document.querySelector('.waiting'), '::before').animationName"
        self.assertEqual("pulse", self.script(moving))
        self.emulate("prefers-reduced-motion", "reduce")
        self.assertEqual("none", self.script(moving))

    def test_texts_are_never_html(self):
        hostile = '<script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1"> [a](javascript:window.hacked=1)'
        self.set(max_tokens=8, system=hostile)
        self.ask(hostile)
        self.assertEqual(hostile, self.texts(".said")[0])
        identity = self.driver.current_url.split("#")[1]
        # As a model could write it, in each place of Markdown. There is no model that does so when asked.
        answer = f"{hostile}\n\n# {hostile}\n\n- **{hostile}**\n  1. *{hostile}*\n\n`{hostile}`\n\n```{hostile}\n{hostile}\n```\n"
        hurt = lambda stored: (stored["messages"][1].update(content=answer), stored.update(title=hostile, model=hostile))
        self.store(identity, hurt)
        self.driver.refresh()
        self.ready()
        shown = self.one(".prose").get_attribute("textContent")
        self.assertEqual(6, shown.count(hostile), shown)
        self.assertEqual([1, 1, 1, 1, 1], [len(self.all(f".prose {tag}")) for tag in ("pre", "strong", "em", "ul", "ol")])
        self.assertEqual([], self.all("main script, main img, aside script, aside img, .prose a, [onerror]"))
        self.assertEqual([hostile], self.texts("#list a"))
        time.sleep(0.2)
        self.assertIsNone(self.script("return window.hacked ?? null"))

    def test_broken_storage(self):
        self.set(max_tokens=8)
        self.ask("A question")
        self.script(
            """
            const id = 'bitnet.conversation.';
            const bad = ['', 'x', 'null', '[]', '5', '{}', '{"messages":5}', '{"messages":[5]}', '{"messages":[{"role":"user"}]}',
              '{"messages":[{"role":"assistant","content":"x"}]}', '{"kind":"text","messages":[{"role":"user","content":"x"}]}'];
            bad.forEach((value, i) => localStorage.setItem(id + String(i).padStart(16, '0'), value));
            localStorage.setItem(id + 'no-id', '{"messages":[{"role":"user","content":"x"}]}');
            const odd = { messages: [{ role: 'user', content: 'Odd', info: 3 }, { role: 'assistant', content: 'x', info: { speed: 'fast', kernels: [1, {}], end: {} } }], title: 7, updated: 'now' };
            localStorage.setItem(id + 'f'.repeat(16), JSON.stringify(odd));
            localStorage.setItem('bitnet.settings', '{"sampling":{"top_p":9,"seed":"x","max_tokens":8},"model":[],"system":4}');
            """
        )
        self.driver.refresh()
        self.ready()
        self.assertEqual(["A question", "Odd"], self.texts("#list a"))
        self.ask("Another")
        self.assertEqual(4, len(self.messages()))
        self.assertLessEqual(set(self.requests()[-1][1]), {"model", "messages", "seed", "max_tokens", "stream", "stream_options"})
        # A full storage is told, and the page works on.
        self.script("try { for (let size = 1 << 22; size; size >>= 1) for (;;) { const s = localStorage; s.setItem('x' + s.length, 'x'.repeat(size)); } } catch {}")
        self.script("for (let size = 1 << 21; size; size >>= 1) try { for (;;) localStorage.setItem('y' + localStorage.length, 'y'.repeat(size)); } catch {}")
        self.begin()
        self.ask("No room " * 50)
        self.assertEqual(2, len(self.messages()))
        self.assertIn("storage is full", self.one("#notice").text)

    def test_server_that_cannot_be_reached(self):
        self.allowed = ["ERR_INTERNET_DISCONNECTED"]
        self.set(max_tokens=8)
        self.ask("A question")
        self.driver.set_network_conditions(offline=True, latency=0, throughput=0)
        self.ask("Are you there?", finish=False)
        self.wait(lambda: "cannot be reached" in self.all(".failure")[-1].text)
        self.assertIn("cannot be reached", self.one("#live").get_attribute("textContent"))
        self.driver.set_network_conditions(offline=False, latency=0, throughput=-1)
        self.all(".retry")[-1].click()
        self.finished()
        self.assertEqual(["A question", "Are you there?"], self.texts(".said"))
        self.assertEqual(4, len(self.messages()))

    def test_refusals_of_the_server_are_told(self):
        self.allowed = ["status of 4"]
        self.set(max_tokens=1000000000)
        self.ask("A question", finish=False)
        self.wait(lambda: not self.running() and self.all(".facts"))
        # A server may also cut the answer at the context's end, and say so.
        told = self.one(".failure").text or self.one("summary").text
        self.assertTrue(told)


class Phone(Browser):
    def test_narrow_screens(self):
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=True)
        self.set(max_tokens=8, system="A system prompt that is longer than the screen is wide, so that it must be cut.")
        # On a phone, Enter starts a line.
        self.one("#message").send_keys("W" * 120, Keys.ENTER, "https://example.com/" + "x" * 120)
        self.assertEqual([], self.messages())
        self.one("#send").click()
        self.finished()
        identity = self.driver.current_url.split("#")[1]
        long = "`" + "y" * 200 + "`\n\n```\n" + "z" * 300 + "\n```\n\n1. " + "v" * 200
        self.store(identity, lambda stored: stored["messages"][1].update(content=long))
        for width, height in ((390, 844), (320, 568)):
            self.size(width, height, mobile=True)
            self.driver.refresh()
            self.ready()
            self.assertEqual([], self.script(OUTSIDE), f"{width} pixels")
            self.script("document.querySelector('summary').click()")
            self.assertEqual([], self.script(OUTSIDE), f"{width} pixels, facts")
            self.one("#settings-open").click()
            self.assertEqual([], self.script(OUTSIDE), f"{width} pixels, settings")
            self.one("#settings .close").click()
            # The list of conversations is a drawer, and out of the way when it is closed.
            self.assertTrue(self.drawer_closed())
            self.one("#menu").click()
            self.wait(lambda: self.one("#new").rect["x"] >= 0)
            self.assertEqual([], self.script(OUTSIDE), f"{width} pixels, list")
            self.assertEqual("true", self.one("#menu").get_attribute("aria-expanded"))
            self.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
            self.wait(self.drawer_closed)
            self.one(".question .edit").click()
            self.assertEqual([], self.script(OUTSIDE), f"{width} pixels, editing")


class WithoutStorage(Browser):
    preferences = {"profile.default_content_setting_values.cookies": 2}

    def test_works_and_says_so(self):
        with self.assertRaisesRegex(WebDriverException, "Access is denied"):
            self.script("return localStorage.length")
        self.assertIn("keeps no data", self.one("#notice").text)
        self.set(max_tokens=8)
        self.ask("A question")
        self.ask("Another")
        self.begin()
        self.all("#list a")[0].click()
        self.wait(lambda: self.texts(".said") == ["A question", "Another"])


class Completion(Browser):
    """A model without a chat template continues a text."""

    kind = "text"

    def finished(self):
        self.wait(lambda: self.one("#continue").text == "Continue")
        self.assertEqual([], [failure.text for failure in self.all(".failure") if failure.is_displayed()])

    def value(self):
        return self.one("#text").get_attribute("value")

    def test_continue_undo_regenerate_reload(self):
        self.assertFalse(self.one("#message").is_displayed())
        self.named()
        self.set(max_tokens=16, seed=3)
        self.one("#text").send_keys("Once upon a time", Keys.CONTROL, Keys.ENTER)
        self.wait(lambda: self.requests())
        self.finished()
        self.assertEqual("Once upon a time", self.requests()[-1][1]["prompt"])
        first = self.value()
        self.assertTrue(first.startswith("Once upon a time"))
        self.assertNotEqual("Once upon a time", first)
        self.assertRegex(self.one("#text-outcome summary").text, r"[\d.,]+ tokens/s · [\d,]+ tokens? · \S+")
        self.assertRegex(self.one("#text-outcome a.receipt").get_attribute("href"), r"/v1/receipts/.+")
        self.one("#another").click()
        self.wait(lambda: len(self.requests()) == 2)
        self.finished()
        self.assertEqual(first, self.value(), "the same seed gave another text")
        self.driver.refresh()
        self.ready()
        self.assertEqual(first, self.value())
        self.one("#undo").click()
        self.assertEqual("Once upon a time", self.value())
        self.one("#text").send_keys(" there was")
        self.driver.refresh()
        self.ready()
        self.assertEqual("Once upon a time there was", self.value())
        self.size(320, 568)
        self.wait(self.drawer_closed)
        self.assertEqual([], self.script(OUTSIDE))

    def test_stop(self):
        for attempt in range(ATTEMPTS):
            self.long(attempt)
            self.slow(6000)
            self.one("#text").send_keys("Once upon a time", Keys.CONTROL, Keys.ENTER)
            try:
                self.wait(lambda: len(self.value()) > 20 and self.one("#continue").text == "Stop", 5)
                self.one("#continue").click()
                self.wait(lambda: self.one("#continue").text == "Continue", 5)
            except TimeoutException:
                self.assertEqual("Continue", self.one("#continue").text, "the text was not stopped")
            if "stopped" in self.one("#text-outcome summary").get_attribute("textContent"):
                break
            self.one("#new").click()
        else:
            self.fail("every text ended before it was stopped")
        text = self.value()
        request = self.requests()[-1][0]
        self.wait(lambda: self.cancelled(request), 5)
        time.sleep(0.5)
        self.assertEqual(text, self.value(), "the text grew after it was stopped")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("urls", nargs="+", metavar="URL")
    parser.add_argument("--key", help="the servers' API key")
    parser.add_argument("--screenshots", type=pathlib.Path, metavar="FOLDER", help="keep a picture of each test's end")
    parser.add_argument("-k", action="append", metavar="PART", help="only tests with this in their name")
    options = browser.OPTIONS = parser.parse_args()
    for url in options.urls:
        url = url.rstrip("/")
        for loaded in (False, True):
            status, _, body = get(f"{url}/v1/models")
            if status != 200:
                sys.exit(f"{url}: /v1/models answers {status}: {body}")
            for model in json.loads(body)["data"]:
                name, facts = model["id"], model["bitnet"]
                if loaded:
                    MODELS.setdefault("chat" if facts["chat"] else "text", (url, name, facts["context"]))
                elif not facts["loaded"]:
                    # A server says more of a model once it was used.
                    get(f"{url}/v1/completions", {"model": name, "prompt": "Once", "max_tokens": 1})
    chosen = [f"-k{part}" for part in options.k or []]
    unittest.main(argv=[sys.argv[0], "-v", *chosen])


if __name__ == "__main__":
    main()
