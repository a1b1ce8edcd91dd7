"""A headless Chromium that uses the chat page as a person does, for page.py."""

import json
import unittest
import urllib.error
import urllib.request

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

OPTIONS = None  # The arguments of page.py
MODELS = {}  # "chat" and "text": (URL, name, tokens of context)
PATIENCE = 60  # Seconds until something that never happens is an error.

# Roles that a user can act on.
CONTROLS = {"button", "link", "textbox", "spinbutton", "combobox", "checkbox", "dialog", "DisclosureTriangle", "log", "article"}


def get(url, send=None):
    """Status, headers and body of a GET, or of a POST of JSON."""
    headers = {"Content-Type": "application/json"} if send else {}
    if OPTIONS.key:
        headers["Authorization"] = f"Bearer {OPTIONS.key}"
    request = urllib.request.Request(url, send and json.dumps(send).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


class Browser(unittest.TestCase):
    """Each test finds the browser as if it had just been installed."""

    kind = "chat"
    preferences = {}  # Of the browser

    @classmethod
    def setUpClass(cls):
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--lang=en"):
            options.add_argument(argument)
        # A headless browser has no mouse, unless it is told so: some controls show when one points at them.
        options.add_argument("--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4")
        options.add_experimental_option("prefs", cls.preferences)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        cls.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        cls.addClassCleanup(cls.driver.quit)

    def setUp(self):
        if self.kind not in MODELS:
            self.fail(f"none of the servers has a model {'with' if self.kind == 'chat' else 'without'} a chat template")
        self.url, self.model, self.context = MODELS[self.kind]
        self.driver.get("about:blank")
        self.cdp("Storage.clearDataForOrigin", origin=self.url, storageTypes="all")
        self.cdp("Emulation.setEmulatedMedia", features=[])
        self.slow(-1)
        self.size(1280, 800)
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.allowed = []  # Parts of messages in the console that this test provokes.
        self.events = []
        self.open()

    def tearDown(self):
        self.picture(self.id().split(".", 1)[1])
        errors = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        if OPTIONS.key:
            self.allowed.append("401")
        # Includes what the Content-Security-Policy refused.
        self.assertEqual([], [error for error in errors if not any(part in error for part in self.allowed)], "in the console")

    def picture(self, name):
        if OPTIONS.screenshots:
            OPTIONS.screenshots.mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(OPTIONS.screenshots / f"{name}.png"))

    # What a user does

    def open(self, path=""):
        self.driver.get(self.url + "/" + path)
        self.ready()

    def ready(self):
        if OPTIONS.key and not self.script("try { return sessionStorage.getItem('bitnet.key') } catch { return null }"):
            for key in ("wrong", OPTIONS.key):
                self.wait(lambda: self.one("#key").get_attribute("open"))
                self.wait(lambda: self.one("#key-value").get_attribute("value") == "")
                self.one("#key-value").send_keys(key, Keys.ENTER)
        self.wait(lambda: self.one("#model").is_enabled())
        if self.one("#model").get_attribute("value") != self.model and not self.all(".question"):
            Select(self.one("#model")).select_by_visible_text(self.model)

    def size(self, width, height, mobile=False):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def set(self, **fields):
        """Fills fields of the settings."""
        self.one("#settings-open").click()
        for name, value in fields.items():
            field = self.one(f"#{name}")
            field.clear()
            field.send_keys(str(value))
        self.one("#settings .close").click()

    def long(self, seed):
        """Lets answers be as long as the context has room."""
        self.set(max_tokens=max(64, self.context // 2), seed=seed)

    def slow(self, bytes_a_second):
        self.driver.set_network_conditions(offline=False, latency=0, throughput=bytes_a_second)

    def ask(self, content, finish=True):
        self.one("#message").send_keys(content, Keys.ENTER)
        if finish:
            self.finished()

    def finished(self):
        self.wait(lambda: self.one("#send").get_attribute("aria-label") == "Send" and self.all(".facts"))
        self.assertEqual([], [failure.text for failure in self.all(".failure") if failure.is_displayed()])

    def begin(self):
        self.one("#new").click()
        self.wait(lambda: not self.all(".question"))

    # What a user sees

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        return [part.get_attribute("textContent") for part in self.all(selector)]

    def messages(self):
        return self.texts(".said, .prose")

    def drawer_closed(self):
        return self.script("return getComputedStyle(document.getElementById('side')).visibility") == "hidden"

    def running(self):
        return self.one("#send").get_attribute("aria-label") == "Stop"

    # Tools

    def wait(self, condition, seconds=PATIENCE):
        def holds(_):
            try:
                return condition()
            except StaleElementReferenceException:
                return False

        return WebDriverWait(self.driver, seconds, poll_frequency=0.02).until(holds)

    def script(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def cdp(self, method, **arguments):
        return self.driver.execute_cdp_cmd(method, arguments)

    def network(self):
        """All events of the network since the test began."""
        self.events += [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event for event in self.events if event["method"].startswith("Network.")]

    def requests(self):
        """(id, body) of each request for an answer."""
        sent = [event["params"] for event in self.network() if event["method"] == "Network.requestWillBeSent"]
        return [
            (params["requestId"], json.loads(params["request"]["postData"]))
            for params in sent
            if params["request"]["method"] == "POST"
        ]

    def cancelled(self, request):
        return any(
            event["method"] == "Network.loadingFailed"
            and event["params"]["requestId"] == request
            and event["params"].get("canceled")
            for event in self.network()
        )

    def emulate(self, feature, value):
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": feature, "value": value}])

    def named(self):
        """Every control of the accessibility tree has a name. Returns (role, name) of all."""
        found = []
        for node in self.cdp("Accessibility.getFullAXTree")["nodes"]:
            role = node.get("role", {}).get("value")
            if not node["ignored"] and role in CONTROLS:
                found.append((role, node.get("name", {}).get("value", "").strip()))
        self.assertEqual([], [role for role, name in found if not name], f"controls without a name, of {found}")
        return found

    def store(self, identity, change):
        """Changes what the browser keeps of a conversation."""
        key = f"bitnet.conversation.{identity}"
        stored = json.loads(self.script("return localStorage.getItem(arguments[0])", key))
        change(stored)
        self.script("localStorage.setItem(...arguments)", key, json.dumps(stored))

    def press(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def tab(self, backwards=False):
        """Presses Tab. The control that has the focus then can be seen to have it."""
        keys = webdriver.ActionChains(self.driver)
        (keys.key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT) if backwards else keys.send_keys(Keys.TAB)).perform()
        # The field for a message shows it with its frame.
        seen = self.script(
            "const it = document.activeElement;"
            "if (it === document.body) return true;"
            "const style = getComputedStyle(it.matches('#message') ? it.parentElement : it);"
            "return it.checkVisibility({ visibilityProperty: true, opacityProperty: true }) && it.offsetWidth > 0 &&"
            " (style.boxShadow.includes('0px 0px 0px 1px') || (style.outlineStyle !== 'none' && style.outlineWidth !== '0px'));"
        )
        self.assertTrue(seen, "the focus cannot be seen on " + self.script("return document.activeElement.outerHTML")[:200])

    def tab_to(self, selector, backwards=False):
        for _ in range(60):
            if self.script("return document.activeElement.matches(arguments[0])", selector):
                return
            self.tab(backwards)
        self.fail(f"Tab never reaches {selector}")
