"""The drawing page, served as a person starts it, in a real browser."""

import http.client
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright
from small_runs import read_until

from experiments.draw.__main__ import main, own_addresses
from experiments.draw.drawing import MAX_POINTS, PEN, SIDE, Drawing

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 60
"""For the page to answer on a busy machine, at most."""

POLLING = "/_nicegui_ws/socket.io/?EIO=4&transport=polling"
"""Where a page asks for news, without a websocket."""

ONE = [(0.5, 0.15), (0.5, 0.85)]
SEVEN = [(0.25, 0.2), (0.75, 0.2), (0.45, 0.85)]
ZERO = [
    (0.5 + 0.25 * math.sin(turn / 20 * math.tau), 0.5 - 0.35 * math.cos(turn / 20 * math.tau))
    for turn in range(21)
]


@pytest.fixture(scope="module")
def server(reader):
    """The command, as a process; what it serves, at which address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.draw", "--workdir", str(reader), "--port", "0",
         "--no-browser"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # NiceGUI takes a process with this variable for a test of its own kind.
        env={name: v for name, v in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
    )  # fmt: skip
    lines = read_until(process, "step ")
    (address,) = re.findall(r"http://\S+", lines[-1])
    assert [line.split()[0] for line in lines] == ["restoring", "step"]
    yield address
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=SECONDS)
    assert (process.returncode, rest) == (0, ""), "Ctrl-C ends it quietly"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        reason = "there is no Chromium to draw in"
        # A gate that skips them would prove nothing.
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(server, browser):
    """Open the page, as often as one likes; no page may complain."""
    contexts, complaints = [], []

    def open_page(**how):
        contexts.append(browser.new_context(**how))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server)
        expect(page.get_by_role("status")).to_contain_text("nothing yet", timeout=1000 * SECONDS)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def draw(page, points):
    """Draw with the mouse, through points in fractions of the paper."""
    box = page.get_by_role("application").bounding_box()
    path = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*path[0])
    page.mouse.down()
    for point in path[1:]:
        page.mouse.move(*point, steps=5)
    page.mouse.up()


def expect_answer(page, answer):
    text = re.compile(rf"^{answer}, \d+\.\d% (un)?sure") if answer.isdigit() else answer
    expect(page.get_by_role("status").locator(".answer")).to_have_text(text, timeout=1000 * SECONDS)


def test_a_person_draws_and_reads_the_answers(open_page):
    page = open_page()
    belief = page.get_by_role("region", name="Belief after each row").locator("[role=img]")
    for answer, points in (("1", ONE), ("7", SEVEN), ("0", ZERO)):
        draw(page, points)
        expect_answer(page, answer)
        expect(belief).to_have_accessible_name(re.compile(rf"to 28: {answer}$|row 28: {answer}$"))
        # What the model sees, what it believes, and the gates: all are pictures now.
        for image in page.locator("[role=img] img").all():
            expect(image).to_have_attribute("src", re.compile("^data:image/png"))
        # Belief has 28 rows and 10 columns, and is as high as what the model sees.
        boxes = [square.bounding_box() for square in page.locator(".square").all()]
        assert [box["height"] for box in boxes] == pytest.approx([box["width"] for box in boxes])
        page.get_by_role("button", name="Clear").click()
        expect_answer(page, "nothing yet")
        expect(belief).to_have_accessible_name("nothing yet")


def test_the_answer_comes_while_drawing_and_goes_with_the_stroke(open_page):
    page = open_page()
    draw(page, ONE)
    expect_answer(page, "1")
    box = page.get_by_role("application").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 20, steps=20)
    # The button is still down, and the bar on the left of the one changed what is seen.
    expect(page.locator(".paper polyline")).to_have_count(2)
    page.mouse.up()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".paper polyline")).to_have_count(1)
    expect_answer(page, "1")
    page.get_by_role("button", name="Undo").click()
    expect_answer(page, "nothing yet")


def test_two_pages_do_not_disturb_each_other(open_page):
    first, second = open_page(), open_page()
    draw(first, ONE)
    draw(second, ZERO)
    expect_answer(first, "1")
    expect_answer(second, "0")
    first.get_by_role("button", name="Clear").click()
    expect_answer(first, "nothing yet")
    expect_answer(second, "0")


def test_a_finger_draws_on_a_phone_and_the_answer_is_in_sight(open_page):
    width, height = 390, 844
    page = open_page(has_touch=True, viewport={"width": width, "height": height})
    box = page.get_by_role("application").bounding_box()
    assert box["width"] > 0.9 * width
    assert box["width"] == pytest.approx(box["height"], abs=1)
    touch = page.context.new_cdp_session(page)
    for k in range(15):
        touch.send("Input.dispatchTouchEvent", {
            "type": "touchMove" if k else "touchStart",
            "touchPoints": [{"x": box["x"] + box["width"] / 2, "y": box["y"] + 40 + 18 * k}],
        })  # fmt: skip
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    expect_answer(page, "1")
    for shown in (page.locator(".answer"), page.get_by_role("button", name="Clear")):
        of = shown.bounding_box()
        assert 0 <= of["y"] <= height - of["height"], "nobody need scroll"
    assert page.evaluate("document.documentElement.scrollWidth") == width


def luminance(colour):
    """Relative luminance (WCAG 2) of a CSS colour."""
    shades = [int(shade) / 255 for shade in re.findall(r"\d+", colour)[:3]]
    light = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shades]
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_buttons_can_be_read_and_colours_are_explained(open_page, scheme):
    page = open_page(color_scheme=scheme)
    for name in ("Clear", "Undo"):
        style = "element => [getComputedStyle(element).color, getComputedStyle(element).background]"
        text, ground = map(luminance, page.get_by_role("button", name=name).evaluate(style))
        low, high = sorted((text, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5
    legends = [" ".join(text.split()) for text in page.locator(".legend").all_inner_texts()]
    assert legends == ["0% 100%", "gate shut, cell state -2 gate open, cell state 2"]


def test_the_keyboard_draws_and_everything_has_a_name(open_page):
    page = open_page()
    paper = page.get_by_role("application", name="Paper")
    expect(paper).to_have_accessible_description(re.compile("arrows move, Shift draws"))
    page.keyboard.press("Tab")
    expect(paper).to_be_focused()
    for _ in range(10):
        page.keyboard.press("ArrowUp")
    for _ in range(20):
        page.keyboard.press("Shift+ArrowDown")
    expect_answer(page, "1")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Clear")).to_be_focused()
    page.keyboard.press("Enter")
    expect_answer(page, "nothing yet")

    assert page.locator("html").get_attribute("lang")
    expect(page.get_by_role("heading", level=1)).to_have_text("Draw a digit")
    pictures = page.locator("[role=img]").all()
    assert len(pictures) == 2 + 4  # of one layer
    assert all(picture.get_attribute("aria-label") for picture in pictures)


def test_nothing_leaves_the_machine(server, browser):
    host = urlsplit(server)
    context = browser.new_context()
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda websocket: asked.append(websocket.url))
    page.goto(server)
    draw(page, SEVEN)
    expect_answer(page, "7")
    context.close()
    assert {urlsplit(url).netloc for url in asked if not url.startswith("data:")} == {host.netloc}
    assert any(url.startswith("ws:") for url in asked)
    # The port listens on the loopback address alone, which /proc writes as 0100007F.
    with open("/proc/net/tcp") as tcp:
        rows = [line.split() for line in tcp][1:]
    local = [row[1].split(":") for row in rows if row[3] == "0A"]
    assert [address for address, port in local if int(port, 16) == host.port] == ["0100007F"]


@pytest.mark.parametrize(
    ("path", "host", "origin", "status"),
    [
        ("/", "{own}", None, 200),
        ("/", "localhost:1", None, 200),
        ("/", "elsewhere.example", None, 400),
        (POLLING, "{own}", None, 200),
        (POLLING, "{own}", "http://{own}", 200),
        (POLLING, "{own}", "http://elsewhere.example", 400),
        (POLLING, "{own}", "null", 400),
        (POLLING, "elsewhere.example", "http://elsewhere.example", 400),
    ],
)
def test_no_other_site_is_answered(server, path, host, origin, status):
    own = urlsplit(server).netloc
    connection = http.client.HTTPConnection(own, timeout=SECONDS)
    headers = {"Host": host.format(own=own)} | (
        {"Origin": origin.format(own=own)} if origin else {}
    )
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    connection.close()
    assert response.status == status
    assert response.getheader("Access-Control-Allow-Origin") in (None, f"http://{own}")


@pytest.mark.parametrize(
    "wrong", ["x", None, [1], True, math.nan, math.inf, 10**400, -SIDE - 1, "9" * 9]
)
def test_what_is_no_point_is_not_drawn(wrong):
    from experiments.draw.page import is_near

    assert not is_near(wrong)
    assert is_near(0)
    assert is_near(SIDE + 0.5)


def test_paper_is_full_at_some_time():
    drawing = Drawing()
    for _ in range(2 * MAX_POINTS):
        drawing.draw_to((1, 1))
        drawing.lift()
    assert sum(map(len, drawing.strokes)) == MAX_POINTS
    copied = drawing.copy()
    drawing.clear()
    assert (len(copied.strokes), drawing.strokes) == (MAX_POINTS, [])


def test_the_address_for_all_machines_is_one_that_they_can_open():
    assert own_addresses("127.0.0.1") == ["127.0.0.1"]
    for address in own_addresses("0.0.0.0"):
        with socket.socket() as own:
            own.bind((address, 0))  # an address that is another machine's is refused
        assert address != "0.0.0.0"


def test_strokes_are_ink():
    drawing = Drawing()
    for y in (40, 240):
        drawing.draw_to((100, y))
    drawing.lift()
    drawing.draw_to((200, 140))  # a dot
    ink = drawing.ink()
    assert ink.shape == (SIDE, SIDE)
    assert [ink[140, x] for x in (100, 150, 200)] == [1, 0, 1]
    assert abs(ink[140, :150].sum() - PEN) <= 1
    assert abs((ink[:, 180:] > 0).sum() / (math.pi * PEN**2 / 4) - 1) < 0.1
    assert drawing.svg().count("<polyline") == 2
    drawing.undo()
    assert not drawing.ink()[:, 180:].any()
    assert drawing.ink().any()
    drawing.clear()
    drawing.undo()
    assert not drawing.ink().any()


@pytest.mark.parametrize("flags", [["--port", "99999"], ["--host", "no such host"]])
def test_an_address_that_can_not_be_served(capsys, flags):
    assert main(["--workdir", "nowhere", *flags]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: --host")


def test_a_port_that_is_in_use_and_a_run_that_can_not_be_drawn_for(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--workdir", "nowhere", "--port", str(port)]) == 2
    assert "in use" in capsys.readouterr().err
    assert main(["--workdir", "nowhere", "--port", "0"]) == 2
    assert "there is no run in nowhere" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"sequence": "pixels"}')
    assert main(["--workdir", str(tmp_path), "--port", "0"]) == 2
    assert "reads pixels, not rows" in capsys.readouterr().err
