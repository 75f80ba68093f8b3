#!/usr/bin/env python3
"""Opens a report in headless Chromium (Debian: apt-get install chromium), uses it as a reader would, and takes screenshots.

scripts/check-report.py results/quickstart/report/index.html SCREENSHOTS

It fails if the page logs an error, asks the network for anything, runs markup of the model's, or if filters, sorting, groups or
search do not show what they should. The screenshots are for somebody to look at. Chromium is spoken to through a pipe, in its
DevTools protocol, so nothing but Python's standard library is needed.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe""".split()


class Browser:
    """One page of a Chromium of its own."""

    def __init__(self, profile):
        their_input, self.output = os.pipe()
        self.input, their_output = os.pipe()

        def pipes():
            # Numbers 3 and 4 are the protocol's; the copies are out of their way first.
            read, write = os.dup(their_input), os.dup(their_output)
            read, write = (os.dup2(end, number) for end, number in ((read, 13), (write, 14)))
            os.dup2(read, 3), os.dup2(write, 4)

        command = ["chromium", *FLAGS, f"--user-data-dir={profile}"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, close_fds=False, preexec_fn=pipes)
        os.close(their_input), os.close(their_output)
        self.buffer, self.count, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.buffer:
            read = os.read(self.input, 1 << 20)
            if not read:
                sys.exit("chromium ended by itself")
            self.buffer += read
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.output, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                if "error" in answer:
                    sys.exit(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def run(self, script):
        """What a script returns, awaited."""
        result = self.call("Runtime.evaluate", expression=f"(async () => {{ {script} }})()", awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            sys.exit(f"{script}: {result['exceptionDetails']['exception']['description']}")
        return result["result"].get("value")

    def until(self, condition, seconds=60):
        started = time.monotonic()
        while not self.run(f"return {condition}"):
            if time.monotonic() - started > seconds:
                sys.exit(f"still not after {seconds} s: {condition}")
            time.sleep(0.05)
        return time.monotonic() - started

    def screenshot(self, path, whole=True):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 12000), "scale": 1}
        options = {"clip": clip, "captureBeyondViewport": True} if whole else {}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"]))


def check(condition, what):
    print(("ok    " if condition else "WRONG ") + what)
    if not condition:
        sys.exit(1)


ROWS = "[...document.querySelectorAll('#rows tr')]"
CELLS = "row => [...row.cells].map(cell => cell.textContent)"
COUNT = "Number(document.getElementById('count').textContent.split(' of ')[0].replaceAll(',', ''))"


def choose(browser, label, option):
    """Picks an option of a filter by its label; returns whether both exist."""
    return browser.run(f"""
        const label = [...document.querySelectorAll('.filters label')].find(label => label.firstChild.textContent === {json.dumps(label)});
        const option = label && [...label.querySelectorAll('option')].find(option => option.textContent === {json.dumps(option)});
        if (!option) return false;
        label.querySelector('select').value = option.value;
        label.querySelector('select').dispatchEvent(new Event('change'));
        return true;""")


def sorts(browser, column):
    """A click on a column's head puts the largest first, a second one the smallest; what is missing stays last."""
    place = browser.run(f"return [...document.querySelectorAll('#heads th')].findIndex(head => head.textContent.startsWith('{column}'))")
    for descending in (True, False):
        browser.run(f"document.querySelectorAll('#heads th')[{place}].querySelector('button').click()")
        texts = browser.run(f"return {ROWS}.map(row => row.cells[{place}].textContent.replace('−', '-'))")
        known = [float(text) for text in texts if text != "–"]
        check(known == sorted(known, reverse=descending), f"sorted by {column}, {'highest' if descending else 'lowest'} first")
        check("–" not in texts[: len(known)], "what is missing comes last")


def use(browser, shots):
    total = browser.run(f"return {COUNT}")
    check(total > 0 and browser.run(f"return {ROWS}.length") == min(25, total), f"{total} rollouts are listed")
    for column in ("Confidence", "Reward", "Tokens"):
        sorts(browser, column)
    for label, option, column in (("Answer", "wrong", "Answer"), ("Read as", "ok", "Read as")):
        if choose(browser, label, option):
            place = browser.run(f"return [...document.querySelectorAll('#heads th')].findIndex(head => head.textContent === '{column}')")
            texts = browser.run(f"return {ROWS}.map(row => row.cells[{place}].textContent)")
            check(set(texts) == {option}, f"{label} = {option}: {browser.run(f'return {COUNT}')} rollouts")
            choose(browser, label, "all")
    check(browser.run(f"return {COUNT}") == total, "all again without filters")
    browser.run("document.querySelector('#rows button').focus()")
    browser.screenshot(shots / "rollouts.png", whole=False)
    browser.run("document.querySelector('#rows button').click()")
    browser.until("document.querySelectorAll('#group .card').length > 0")
    check(browser.run("return document.querySelectorAll('#group .card[aria-current=true]').length") == 1, "the group of a rollout")
    browser.run("document.getElementById('group').scrollIntoView()")
    browser.screenshot(shots / "group.png", whole=False)
    words = browser.run("return document.querySelector('#group .card[aria-current=true] > pre').textContent.trim().slice(0, 12)")
    browser.run(f"""const search = document.querySelector('input[type=search]'); search.value = {json.dumps(words)};
        search.dispatchEvent(new Event('change'));""")
    seconds = browser.until("/ of /.test(document.getElementById('count').textContent)")
    found = browser.run(f"return {COUNT}")
    check(0 < found <= total, f"{found} rollouts hold {words!r}, found in {seconds:.1f} s")
    browser.run("const search = document.querySelector('input[type=search]'); search.value = ''; search.dispatchEvent(new Event('change'))")
    browser.until(f"{COUNT} === {total}")
    check(browser.run("return document.getElementById('pair').textContent.length > 0"), "first and last of a question")
    browser.run("document.getElementById('pairs').scrollIntoView()")
    browser.screenshot(shots / "pairs.png", whole=False)


def main():
    page, shots = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        views = [("desktop", 1280, 900, "light"), ("dark", 1280, 900, "dark"), ("phone", 375, 760, "light")]
        for name, width, height, scheme in views:
            phone = name == "phone"
            browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
            browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            started = time.monotonic()
            browser.call("Page.navigate", url=page.as_uri())
            browser.until("document.readyState === 'complete' && document.querySelectorAll('#rows tr').length > 0")
            print(f"      {name}: opened in {time.monotonic() - started:.1f} s")
            wide = browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
            check(wide <= 0, f"{name}: nothing is wider than the window")
            browser.screenshot(shots / f"{name}.png")
            if name == "desktop":
                use(browser, shots)
        pdf = browser.call("Page.printToPDF", printBackground=True)["data"]
        (shots / "paper.pdf").write_bytes(base64.b64decode(pdf))
        asked = [event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
        check(asked and all(url == page.as_uri() for url in asked), f"nothing but the page itself was asked for: {sorted(set(asked))[:3]}")
        bad = [event for event in browser.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")]
        check(not bad, f"no error was logged {bad[:2] if bad else ''}")
        browser.process.terminate()
        browser.process.wait()


main()
