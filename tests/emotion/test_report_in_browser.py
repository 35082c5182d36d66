"""The pages in a real browser: at the widths of a phone and of a desk, in both themes, by keyboard, without a network.

To look at them: python -m tests.browser PAGE FOLDER.
"""

import base64
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from emotion.config import MelConfig
from emotion.evaluation.plots import labels_on_the_plane, real_above_synthetic, save_figure, save_spectrogram
from emotion.report.run_report import Facts, write_report
from tests.browser import THEMES, WIDTHS, Browser, browser
from tests.emotion.test_report import published, write_wav

pytestmark = pytest.mark.full

# Every element with text of its own, with the ratio of its colour to that of what lies behind it, by WCAG 2.2.
CONTRASTS = """
(() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = (c) => { const v = c / 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return null;
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    if (element.closest("script, title") || !element.getClientRects().length) continue;
    if (![...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(element);
    const colour = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [luminance(parse(colour)), luminance(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.tagName, element.textContent.trim().slice(0, 40)]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def tab(component: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(component("chromium"), tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything that one can have: long names, players, several attempts, a wide spec."""
    run = published(tmp_path_factory.mktemp("published") / "run", drawn=True)
    split = ["song_id,group,split\n", *(f"{song},{'a group with a long name ' * 4}{song % 3},test\n" for song in range(40))]
    (run / "split.csv").write_text("".join(split), encoding="utf-8")
    warning = {"phase": "vit", "step": 3, "warning": "x", "text": "a/very/long/path/without/a/blank/" * 6}
    with (run / "logs" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(warning) + "\n")
    with (run / "spec.yaml").open("a", encoding="utf-8") as file:
        file.write(f"data:\n  source: {'/a/long/path' * 8}\n")
    clips = np.linspace(-80, 0, 4 * 50 * 16, dtype=np.float32).reshape(4, 50, 16)
    (run / "pictures").mkdir()
    save_figure(run / "pictures" / "clips.png", real_above_synthetic(clips[:2], clips[2:]))
    save_figure(run / "pictures" / "labels.png", labels_on_the_plane(np.zeros((3, 2)), np.ones((4, 2))))
    for sample in (run / "samples").glob("*.png"):
        save_spectrogram(sample, clips[0], MelConfig(mels=16), "a sample")
    write_wav(run / "song.wav", 22050, 1)
    attempts = [
        {"began": "2026-11-27T10:00:00+00:00", "duration_seconds": 9.0, "reason": "killed", "host": "node1", "lost_seconds": 2.0},
        {"began": "2026-11-27T10:01:00+00:00", "duration_seconds": 9.0, "reason": "publishing", "host": "node2"},
    ]
    sound = io.BytesIO()
    soundfile.write(sound, *soundfile.read(run / "song.wav"), format="MP3")
    facts = Facts(
        attempts=attempts,
        provenance=[("code", "0" * 90)],
        genres={song: "folk" if song % 2 else "rock" for song in range(40)},
        excerpt=lambda _: sound.getvalue(),
    )
    write_report(run, "a-run-0123456789ab", facts)
    return run / "report.html"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_the_page_fits_its_screen_and_can_be_read(tab: Browser, page: Path, width: int, theme: str) -> None:
    tab.open(page, width, theme=theme)
    assert tab.run("document.documentElement.scrollWidth") == tab.run("innerWidth") == width
    dark = tab.run("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (theme == "dark")
    contrasts: list[Any] = tab.run(CONTRASTS)
    assert len(contrasts) > 200
    assert [found for found in contrasts if found[0] < 4.5] == []
    smallest = tab.run("Math.min(...[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect().height))")
    assert smallest > 8  # letters of the charts are not shrunk on a phone


def pixels(tab: Browser, element: str) -> NDArray[np.float64]:
    """[rows, columns, 3] in 0..1: what is seen of an element, given as an expression."""
    box = tab.run(
        f"(() => {{ const box = ({element}).getBoundingClientRect();"
        " return [box.x + scrollX, box.y + scrollY, box.width, box.height]; })()"
    )
    clip = {**dict(zip(("x", "y", "width", "height"), map(round, box), strict=True)), "scale": 1}
    found = tab.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
    picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(found["data"])))
    return np.asarray(picture, dtype=float)[:, :, :3]


@pytest.mark.parametrize("theme", THEMES)
def test_a_shadow_says_where_there_is_more_to_scroll_to(tab: Browser, page: Path, theme: str) -> None:
    tab.open(page, 360, theme=theme)
    tab.run("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    tab.run("window.scrollers = [...document.querySelectorAll('.scroll, pre')]")
    # Without letters, and with white pictures, all that is left to see are the shadows.
    style = "table { visibility: hidden; } pre { color: transparent; } .scroll img { filter: brightness(0) invert(1); }"
    tab.run(f"document.head.append(Object.assign(document.createElement('style'), {{ textContent: '{style}' }}))")
    wide = tab.run("scrollers.map((e) => e.scrollWidth - e.clientWidth)")
    has_table = tab.run("scrollers.map((e) => e.querySelector('table') !== null)")
    assert 0 in wide
    assert sum(room > 0 for room in wide) > 5
    for number, room in enumerate(wide):
        shades = []
        for place in (0, room / 2, room) if room else (0,):
            tab.run(f"scrollers[{number}].scrollLeft = {place}")
            seen = pixels(tab, f"scrollers[{number}]")
            row = seen[len(seen) // 2]
            shades.append([bool(np.abs(edge - row[len(row) // 2]).max() > 0.1) for edge in (row[1], row[-2])])
        left = not has_table[number]
        assert shades == ([[False, True], [left, True], [left, False]] if room else [[False, False]]), number


def test_whatever_scrolls_is_named_and_scrolled_by_the_keyboard(tab: Browser, page: Path) -> None:
    tab.open(page, 360)
    tab.run("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    tab.run(
        "window.wide = [...document.querySelectorAll('main *')].filter((e) => !e.closest('svg') && e.scrollWidth > e.clientWidth"
        " && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX))"
    )
    names = tab.run("wide.map((e) => e.tabIndex === 0 && e.role === 'region' && e.getAttribute('aria-label'))")
    assert len(names) > 5
    assert all(names)
    for number in range(len(names)):
        tab.run(f"wide[{number}].focus()")
        tab.press("ArrowRight")
        assert tab.run(f"new Promise((done) => {{ wide[{number}].onscroll = () => done(wide[{number}].scrollLeft); }})") > 0


@pytest.mark.parametrize("theme", THEMES)
def test_pictures_do_not_glare_in_the_dark(tab: Browser, page: Path, theme: str) -> None:
    tab.open(page, 1280, theme=theme)
    number = tab.run("document.images.length")
    assert number == 3
    brightest = [pixels(tab, f"document.images[{image}]").max() for image in range(number)]
    assert brightest == [1] * number if theme == "light" else brightest == pytest.approx([0.765] * number, abs=0.02)


def test_nothing_is_fetched_and_the_console_stays_empty(tab: Browser, page: Path) -> None:
    tab.open(page, 360)
    tab.run("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    requests = [found["request"]["url"] for found in tab.methods("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    for name in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
        assert tab.methods(name) == []
    # The policy of the page refuses what a name that is no name would bring in.
    blocked = tab.run(
        "new Promise((done) => { document.addEventListener('securitypolicyviolation', (e) => done(e.effectiveDirective));"
        " document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/x.png' })); })"
    )
    assert blocked == "img-src"


def test_songs_are_reached_with_the_mouse_and_with_the_keyboard(tab: Browser, page: Path) -> None:
    tab.open(page, 1280)
    focused = "document.activeElement.matches('.song') ? document.activeElement.textContent : ''"
    shown = "document.querySelector('.plane .readout').textContent"
    tab.run("document.querySelector('.plane').scrollIntoView()")
    names = tab.run("[...document.querySelectorAll('.song title')].map((t) => t.textContent)")
    assert len(names) == 40
    for number in (5, 17):
        box = tab.run(
            f"(() => {{ const b = document.querySelectorAll('.song')[{number}].querySelector('circle').getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        tab.point_at(*box)
        assert tab.run(shown) == names[number]
    # One stop for all songs: from a link before the plane into it, from song to song, and out again.
    tab.run("[...document.querySelectorAll('nav a')].at(-1).focus()")
    stops = [tab.press("Tab") or tab.run(focused) for _ in range(12)]
    assert [stop for stop in stops if stop] == [names[17]]
    tab.run("document.querySelector('.song[tabindex=\"0\"]').focus()")
    for key, number in (("ArrowRight", 18), ("ArrowLeft", 17), ("End", 39), ("ArrowDown", 39), ("Home", 0)):
        tab.press(key)
        assert tab.run(focused) == tab.run(shown) == names[number]
    assert tab.run("document.querySelectorAll('.song[tabindex=\"0\"]').length") == 1


def test_a_screen_reader_finds_names_headings_and_headers(tab: Browser, page: Path) -> None:
    tab.open(page, 1280)
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]

    def named(*roles: str) -> list[str]:
        found = [node for node in nodes if node.get("role", {}).get("value") in roles and not node["ignored"]]
        return [node.get("name", {}).get("value", "") for node in found]

    for roles in (
        ("Audio",),
        ("image", "img"),
        ("link",),
        ("region",),
        ("table",),
        ("navigation",),
        ("group",),
        ("DisclosureTriangle",),
    ):
        assert named(*roles), roles
    for role in ("Audio", "image", "link", "region", "navigation", "button", "slider", "DisclosureTriangle"):
        assert "" not in named(role), role
    levels = tab.run("[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map((h) => Number(h.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert tab.run("[...document.querySelectorAll('th')].filter((t) => !t.scope || !t.textContent.trim()).length") == 0


def test_players_play(tab: Browser, page: Path) -> None:
    tab.open(page, 1280)
    seconds = tab.run(
        "Promise.all([...document.querySelectorAll('audio')].map((a) => new Promise((done) => {"
        " a.onloadedmetadata = () => done(a.duration); a.onerror = () => done(a.error.message); a.load(); })))"
    )
    assert len(seconds) == 9
    assert seconds == pytest.approx([1.0] * 9, abs=0.1)
