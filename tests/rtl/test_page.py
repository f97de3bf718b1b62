"""rtl.page: the report as a browser without a network sees it, and what it says of runs."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from test_report import row

import rtl
from rtl import svg
from rtl.cli import main
from rtl.curve import Curve
from rtl.page import RunView, names_of, page, write_page
from rtl.recipes.published import REMARKS
from rtl.report import environment, insights, write_results

RESULTS = Path(__file__).parents[2] / "results"
CURVE = Path(__file__).parent / "fixtures" / "curves" / "digits-fine.json"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = '</script><!--<script><b>"&é'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with everything a page shows: a real curve with its alarm, real tickets, and a class of a nasty name."""
    place = tmp_path_factory.mktemp("runs") / "everything"
    curve = Curve.from_json(json.loads(CURVE.read_text()))
    named = Curve(("0", NASTY, *curve.names[2:9], "10"), curve.sizes, curve.overlaps)
    meaning = rtl.semantics.from_embedding([[k + 1.0, (k * 7) % 5, 1.0] for k in range(10)])
    levels = (0.5, 0.9, 0.98)
    scores = {0.5: 0.98, 0.9: 0.97, 0.98: 0.85}
    per_class = [
        {"method": "rtl", "sparsity": s, "seed": 0, "balanced_accuracy.threshold": [scores[s]] * 10} for s in levels
    ]
    pixel = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
    example = {"sample": 3, "score": 0.7, "own": "0", "picture": pixel}
    details = {
        "class_names": list(named.names),
        "per_class": per_class,
        "similarity": {},
        **insights(named, meaning, {"0.5": named}),
        "routing": [
            {"router": r, "sparsity": s, "seed": n, "routing": 0.9 + 0.01 * n, "accuracy": 0.8, "calibration": 0.02}
            for r in ("confidence", "oracle")
            for s in levels
            for n in (0, 1)
        ],
        "examples": {
            "0.5": [example | {"ticket": NASTY, "kind": k} for k in ("right", "missed", "false alarm")],
        },
    }
    rows = [row(m, s, n, similarity=0.8) for m in ("rtl", "imp_single") for s in levels for n in (0, 1)]
    rows.append(row("dense", 0.0, accuracy=0.99))
    table = {
        "recipe": "cifar10",
        "command": f"rtl run cifar10 --x '{NASTY}'",
        "environment": environment(),
        "rows": rows,
    }
    write_results(place, table, details)
    (place / "config.json").write_text(json.dumps({"lr": 0.002, "_type": "X"}))
    shutil.copytree(RESULTS / "digits" / "tickets" / "0.9", place / "tickets" / "0.9")
    for name in ("street/0.5-rtl.png", "clip.wav"):
        (place / "media" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "media" / name).write_bytes(PIXEL)
    return place


PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")


class Outline(HTMLParser):
    """Tags with their attributes, and what is not closed."""

    VOID = ("meta", "link", "input", "img", "br", "line", "rect", "circle", "path", "polyline")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.inputs = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "input":
            self.inputs.append(self.open[-1])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def html(folder):
    return page([RunView.read(folder)])


def test_it_is_one_well_formed_file_that_fetches_nothing(html):
    outline = Outline(html)
    assert outline.open == []
    for tag, attributes in outline.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", html)


def test_whoever_does_not_see_it_is_told(html):
    outline = Outline(html)
    assert ("html", {"lang": "en"}) in outline.tags
    for tag, attributes in outline.tags:
        if tag == "svg":
            assert attributes.get("role") == "img" or attributes.get("aria-hidden") == "true"
        if tag == "img":
            assert attributes["alt"]
        if tag == "audio":
            assert attributes["aria-label"]
            assert "controls" in attributes
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert outline.inputs == ["label", "label"]
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in outline.tags if tag == "a"} <= set(ids)


def test_names_are_shown_and_never_obeyed(html):
    assert NASTY not in html
    assert "".join(Outline(html).text).count(NASTY) > 10


def test_every_part_is_there(html):
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", html)
    assert headings == [
        "Results",
        "Against sparsity",
        "What tickets share",
        "How many tickets keep a weight",
        "Sharing and meaning",
        "Which ticket serves an input",
        "Each ticket",
        "Samples right and wrong",
        "Pictures and sounds",
        "Cost",
        "What was run",
    ]
    text = "".join(Outline(html).text)
    for said in (
        "Collapse alarm",
        "identical masks",
        "independent masks",
        "paper: RTL",
        "two-fold",
        "oracle",
        "lr",
        "by stage of training",
    ):
        assert said in text
    assert html.count("<audio") == 1
    assert "0.781" in text
    assert "103,000" in text


def test_what_is_to_be_known_of_the_papers_figures_stands_below_them(folder):
    view = RunView.read(folder)
    other = RunView(view.name, folder, view.table | {"recipe": "cifar100"}, view.details)
    said = REMARKS["cifar100", "imp_single"]
    assert said in "".join(Outline(page([other])).text)
    assert said not in "".join(Outline(page([view])).text)


@pytest.mark.parametrize("only", [row(), row("dense", 0.0)], ids=["rtl", "dense"])
def test_a_run_with_little_shows_what_it_has(tmp_path, only):
    table = {"recipe": "digits", "command": "rtl run digits", "environment": environment(), "rows": [only]}
    write_results(tmp_path / "small", table, {"class_names": [], "per_class": []})
    text = page([RunView.read(tmp_path / "small")])
    assert re.findall(r"<h2[^>]*>([^<]*)</h2>", text) == ["Results", "Against sparsity", "Cost", "What was run"]
    assert Outline(text).open == []


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path, folder):
    for place in ("a/mine/run", "b/mine/run"):
        shutil.copytree(folder, tmp_path / place)
    write_page([tmp_path / "a/mine/run", tmp_path / "b/mine/run"], tmp_path / "page.html")
    outline = Outline((tmp_path / "page.html").read_text())
    assert "a/mine/run, b/mine/run" in outline.text
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert names_of([tmp_path / "a/x", tmp_path / "b/y"]) == ["x", "y"]
    assert names_of([tmp_path / "a/x"] * 2) == ["x", "x"]


def test_every_column_and_chart_is_named_in_words(html):
    text = "".join(Outline(html).text)
    assert "BA thr.: balanced accuracy, score ≥ ½;" in text
    assert "<figcaption>balanced accuracy, score ≥ ½</figcaption>" in html
    assert "<figcaption>BA thr.</figcaption>" not in html


def test_too_few_rounds_are_not_called_quiet(folder):
    view = RunView.read(folder)
    two = Curve(view.curve.names, view.curve.sizes, {n: o[:2] for n, o in view.curve.overlaps.items()})
    young = RunView(view.name, folder, view.table, {**view.details, **insights(two)})
    assert "2 rounds are known, too few" in page([young])
    silent = RunView(view.name, folder, view.table, {**view.details, "alarms": []})
    assert "No collapse alarm" in page([silent])


def test_lines_of_several_protocols_are_told_apart(folder):
    view = RunView.read(folder)
    rows = [*view.table["rows"], *(one | {"protocol": "paper"} for one in view.table["rows"])]
    html = page([RunView(view.name, folder, {**view.table, "rows": rows}, view.details)])
    chart = html[html.index('<section id="curves"') :]
    chart = chart[: chart.index("</figure>")]
    assert all(name in chart for name in ("RTL, quick", "RTL, paper", "dense, quick", "dense, paper"))
    drawn = re.findall(r'<polyline class="(\w+ c\d)"', chart)
    assert {"line c0", "line c1", "line c3", "line c4"} <= set(drawn)


def test_variants_at_one_sparsity_are_named_dots(folder):
    view = RunView.read(folder)
    rows = [one for one in view.table["rows"] if one["sparsity"] in (0.0, 0.5)]
    rows += [one | {"variant": "schedule=mixed"} for one in rows if one["method"] == "rtl"]
    html = page([RunView(view.name, folder, {**view.table, "rows": rows}, view.details)])
    chart = html[html.index('<section id="curves"') :]
    chart = chart[: chart.index("</figure>")]
    names = re.findall(r'text-anchor="end">([^<]*)<', chart)
    assert {"RTL", "RTL (schedule=mixed)", "dense"} <= set(names)
    xs = [float(x) for x in re.findall(r'(?:cx="|translate\()([\d.]+)', chart)]
    assert len(xs) == len(names)
    dashed = re.search(r'class="dashed c9" points="([\d.]+),', chart)[1]
    assert float(dashed) == xs[0] == xs[names.index("RTL (schedule=mixed)")]
    values = [float(value) for value in re.findall(r"<title>[^<]*: ([\d.]+)</title>", chart)]
    assert sorted(range(len(xs)), key=xs.__getitem__) == sorted(range(len(xs)), key=values.__getitem__)


def test_tickets_at_one_sparsity_are_named_dots(folder):
    view = RunView.read(folder)
    own = [one for one in view.details["per_class"] if one["sparsity"] == 0.5]
    html = page([RunView(view.name, folder, view.table, {**view.details, "per_class": own})])
    chart = html[html.index("of each ticket, first seed") :]
    chart = chart[: chart.index("</figure>")]
    assert [unescape(name) for name in re.findall(r'text-anchor="end">([^<]*)<', chart)] == list(view.curve.names)


def test_a_chart_of_rows_leaves_out_what_is_not_known():
    drawn = svg.dot_chart("t", [svg.Series("a<b", [(0.5, 1.0)]), svg.Series("c", [(0.5, float("nan"))])])
    assert "a&lt;b" in drawn
    assert ">c<" not in drawn
    assert svg.dot_chart("t", [svg.Series("c", [(0.5, float("nan"))])]) == ""


def each_ticket(view, **details):
    """The section on each ticket of a run with other details."""
    html = page([RunView(view.name, view.folder, view.table, {**view.details, **details})])
    return "".join(Outline(html[html.index('<section id="classes"') : html.index('<section id="examples"')]).text)


def test_a_regions_figures_are_of_one_image_and_schedule_which_are_named(folder):
    view = RunView.read(folder)
    common = {"method": "rtl", "sparsity": 0.5, "seed": 0}
    per_image = [
        common | {"image": image, "variant": variant, "psnr_by_region": [psnr] * 10}
        for image, variant, psnr in (
            ("first", "schedule=pooled", 31.111),
            ("second", "schedule=pooled", 22.222),
            ("first", "schedule=mixed", 13.333),
        )
    ]
    text = each_ticket(view, per_image=per_image)
    assert "PSNR (dB) of each ticket, first, schedule=pooled, first seed, by sparsity" in text
    assert text.count("31.111") == 10
    assert "22.222" not in text
    assert "13.333" not in text
    merged = [one | {"protocol": "reduced"} for one in per_image] + [per_image[0] | {"protocol": "paper"}]
    assert "first, schedule=pooled, reduced, first seed" in each_ticket(view, per_image=merged)


def test_every_scenes_ticket_is_shown(folder):
    view = RunView.read(folder)
    per_class = [
        {"method": method, "sparsity": s, "seed": 0, "si_snri": {"indoor": 5 + s, "outdoor": 7.5}}
        for method in ("imp_single", "rtl")
        for s in (0.25, 0.5)
    ]
    text = each_ticket(view, per_class=per_class, alarms=[])
    assert "SI-SNRi (dB) of each ticket, first seed, by sparsity" in text
    assert all(value in text for value in ("indoor", "5.250", "5.500", "outdoor", "7.500"))
    assert "every ticket on every scene" not in text
    crossed = {"class_names": ["indoor", "outdoor"], "crossed": {"0.5": [[5.5, 6.125], [1.25, 7.5]]}}
    text = each_ticket(view, per_class=per_class, alarms=[], **crossed)
    assert "SI-SNRi (dB) of every ticket on every scene, 50% sparsity" in text
    assert all(value in text for value in ("on outdoor", "6.125", "1.250"))


def test_routers_of_several_protocols_are_not_averaged(folder):
    view = RunView.read(folder)
    old = [{key: value for key, value in one.items() if key != "protocol"} for one in view.details["routing"]]
    ours = [one | {"protocol": "paper", "routing": 0.123} for one in old]
    both = RunView(view.name, folder, view.table, {**view.details, "routing": [*old, *ours]})
    text = "".join(Outline(page([both])).text)
    assert "confidence, paper" in text
    assert "0.123 ±\N{NO-BREAK SPACE}0.000" in text
    assert "0.905 ±\N{NO-BREAK SPACE}0.007" in text  # the older run's own


def test_weights_are_counted_by_how_many_tickets_keep_them(html):
    net = rtl.TicketNetwork.from_pretrained(RESULTS / "digits" / "tickets" / "0.9")
    kept = {layer: bank.to_dense().sum(0) for layer, bank in net.net.banks.items()}
    total = sum(k.numel() for k in kept.values())
    for n in (0, 1, 5, 10):
        assert f"{sum(int((k == n).sum()) for k in kept.values()):,} kept by {n}" in html
    assert f"all layers: of {total:,} weights" in html


def test_a_chart_breaks_at_what_is_not_known_and_lists_its_numbers():
    drawn = svg.line_chart("t", [svg.Series("a<b", [(0.1, 1), (0.2, float("nan")), (0.3, 2), (0.4, 3)])], "x")
    assert len(re.findall(r"<polyline class=\"line c0\" points", drawn)) == 3  # two pieces and the legend's
    assert "a&lt;b" in drawn
    assert "<td>–</td>" in drawn
    assert svg.line_chart("t", [svg.Series("a", [(0.1, float("nan"))])], "x") == ""


def test_equal_sparsities_are_one_row_though_their_mean_is_off_by_a_bit():
    third = (0.1 + 0.2) / 3
    drawn = svg.line_chart("t", [svg.Series("a", [(0.1, 1), (0.9, 3)]), svg.Series("b", [(third, 2), (0.9, 4)])], "x")
    assert third != 0.1
    assert drawn.count("<tr>") == 3  # a heading, two rows


def test_of_many_points_some_are_marked_and_the_alarm_lies_on_its_tickets_line(html):
    many = [svg.Series("a", [(n / 100, n) for n in range(80)])]
    assert 8 <= svg.line_chart("t", many, "x").count("<circle") - 1 <= 10  # the legend has one
    chart = html[html.index("balanced accuracy of each ticket") :]
    chart = chart[: chart.index("</svg>")]
    points = [tuple(map(float, p.split(","))) for p in re.search(r'c3" points="([^"]*)"', chart)[1].split()]
    x, y = (float(v) + 5 for v in re.search(r'class="alarm c3" d="M([\d.]+) ([\d.]+)l', chart).groups())
    (x0, y0), (x1, y1) = points[-2:]
    assert y == pytest.approx(y0 + (y1 - y0) * (x - x0) / (x1 - x0), abs=0.2)


def test_beyond_nine_tenths_equal_steps_are_equal_factors_of_density():
    points = [(0.5, 0.0), (0.75, 1.0), (0.875, 0.0), (0.9375, 1.0)]
    drawn = svg.line_chart("t", [svg.Series("a", points)], "sparsity")
    xs = [float(p.split(",")[0]) for p in re.search(r'class="line c0" points="([^"]*)"', drawn)[1].split()]
    steps = [b - a for a, b in pairwise(xs)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)


def test_the_tree_joins_the_most_alike_first():
    drawn = svg.tree(["a", "b", "c"], [[0, 2, 0.1, 2], [1, 3, 0.5, 3]], "tree")
    leaves = re.findall(r'text-anchor="end">([abc])<', drawn)
    assert leaves in (["b", "a", "c"], ["a", "c", "b"], ["b", "c", "a"], ["c", "a", "b"])
    assert ">0.500<" in drawn


# In a browser

DRIVE = """
<script>
const said = {errors: []};
addEventListener("error", (e) => said.errors.push(e.message));
const section = document.querySelector(".similarity"), slider = section.querySelector("input[type=range]");
const fills = () => [...section.querySelectorAll(".matrices rect")].map((r) => r.getAttribute("fill")).join();
const labels = () => [...section.querySelectorAll(".matrices svg")].map((s) => s.getAttribute("aria-label"));
said.ready = document.documentElement.dataset.ready;
said.last = [section.querySelector("output").textContent, labels()[0]];
const before = fills();
slider.value = 0; slider.dispatchEvent(new Event("input"));
said.first = [section.querySelector("output").textContent, labels()[0], slider.getAttribute("aria-valuetext")];
said.moved = fills() !== before;
said.trees = [...section.querySelectorAll("[data-round]")].filter((t) => !t.hidden).map((t) => t.dataset.round);
const choice = section.querySelector("select");
choice.value = "features.3.0"; choice.dispatchEvent(new Event("change"));
said.chosen = labels().at(-1);
said.listed = [...section.querySelectorAll(".numbers td")].map((c) => c.textContent);
const table = document.querySelector("table.sortable"), heads = [...table.tHead.rows[0].cells];
const column = (n) => [...table.tBodies[0].rows].map((r) => r.cells[n].textContent);
const balanced = heads.findIndex((h) => h.textContent === "BA thr.");
said.unsorted = column(balanced);
const sort = () => { heads[balanced].firstChild.click(); return heads[balanced].getAttribute("aria-sort"); };
said.upSort = sort(); said.up = column(balanced);
said.downSort = sort(); said.down = column(balanced);
heads[0].firstChild.click(); said.names = column(0);
const sorted = (where, heading) => {
  const table = document.querySelector(where + " table.sortable");
  const number = [...table.tHead.rows[0].cells].findIndex((h) => h.textContent === heading);
  table.tHead.rows[0].cells[number].firstChild.click();
  return [...table.tBodies[0].rows].map((r) => r.cells[number].textContent);
};
said.tickets = sorted("#classes", "ticket");
said.kept = sorted("#layers", "kept by all");
said.significant = sorted("#meaning", "layers with p < 0.05");
heads[0].firstChild.focus(); said.focus = document.activeElement.textContent;
dispatchEvent(new Event("beforeprint"));
said.open = [...document.querySelectorAll("details")].every((d) => d.open !== d.matches(".numbers"));
said.wide = document.documentElement.scrollWidth > innerWidth;
const out = document.createElement("pre");
out.id = "said"; out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(said))));
document.body.append(out);
</script></body>"""


def browse(file, *options):
    """Chromium's standard output and what it logged, with no way to any other machine."""
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", "--window-size=1200,900"),
            *(f"--user-data-dir={file.parent / 'profile'}", "--blink-settings=preferredColorScheme=1"),
            *options,
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")


@needs_chromium
def test_in_chromium_the_slider_and_sorting_work_and_the_console_is_silent(tmp_path, html):
    file = tmp_path / "report.html"
    file.write_text(html.replace("</body>", DRIVE))
    dom, console = browse(file, "--dump-dom")
    said = json.loads(base64.b64decode(re.search(r'<pre id="said">([^<]*)</pre>', dom)[1]))
    assert console == []
    assert said["errors"] == []
    assert said["ready"] == "yes"
    assert said["last"][0] == "99.0%"
    assert said["first"][0] == "10.0%"
    assert said["first"][2] == "10.0% sparsity, round 1 of 36"
    means = [float(re.search(r"mean ([\d.]+)", said[key][1])[1]) for key in ("first", "last")]
    assert means == pytest.approx([0.885, 0.826], abs=0.0015)
    assert said["moved"]
    assert said["trees"] == ["0"]
    assert "features.3.0" in said["chosen"]
    listed = [float(cell) for cell in said["listed"] if cell != "–"]
    assert len(listed) == 10 * 9
    mean = float(re.search(r"mean ([\d.]+)", said["chosen"])[1])
    assert sum(listed) / len(listed) == pytest.approx(mean, abs=0.001)

    def numbers(cells):
        return [float(c.split()[0]) for c in cells if c != "–"]

    assert numbers(said["up"]) == sorted(numbers(said["unsorted"]))
    assert numbers(said["down"]) == sorted(numbers(said["unsorted"]), reverse=True)
    assert said["up"] != said["unsorted"]
    unknown = said["up"].count("–")
    assert unknown > 0
    assert said["up"][-unknown:] == said["down"][-unknown:] == ["–"] * unknown
    assert (said["upSort"], said["downSort"]) == ("ascending", "descending")
    assert said["names"] == sorted(said["names"], key=str.lower)
    assert [name for name in said["tickets"] if name != NASTY] == ["0", *"2345678", "10"]
    kept = [float(cell.rstrip("%")) for cell in said["kept"]]
    assert kept == sorted(kept)
    assert len(set(kept)) > 3
    significant = [int(cell.split()[0]) for cell in said["significant"]]
    assert significant == sorted(significant)
    assert said["focus"] == "method"
    assert said["open"]
    assert not said["wide"]


@needs_chromium
def test_in_chromium_a_narrow_screen_scrolls_tables_and_not_what_is_said_of_them(tmp_path, html):
    measure = """<script>
    const rooms = [...document.querySelectorAll("caption span")].map((s) => {
      const room = s.closest(".scroll");
      return room.offsetWidth && [s.getBoundingClientRect().width, room.offsetWidth, room.scrollWidth];
    });
    document.body.insertAdjacentHTML("beforeend", `<pre id="said">${JSON.stringify([rooms, innerWidth,
      document.documentElement.scrollWidth])}</pre>`);
    </script></body>"""
    file = tmp_path / "report.html"
    file.write_text(html.replace("</body>", measure))
    dom, _ = browse(file, "--dump-dom", "--window-size=500,900")
    rooms, screen, width = json.loads(re.findall(r'<pre id="said">([^<]*)</pre>', dom)[-1])  # the first is the script's
    assert width <= screen
    assert any(table > room for _, room, table in filter(None, rooms))
    assert all(caption <= room for caption, room, _ in filter(None, rooms))


@needs_chromium
def test_in_chromium_an_error_would_be_seen(tmp_path, html):
    """What the test above relies on."""
    file = tmp_path / "report.html"
    file.write_text(html.replace("</body>", "<script>nothing.here()</script></body>"))
    _, console = browse(file, "--dump-dom")
    assert any("nothing is not defined" in line for line in console)


@needs_chromium
def test_in_chromium_two_runs_fit_a_screen_and_print(tmp_path, folder):
    write_page([folder, RESULTS / "digits"], tmp_path / "report.html")
    _, console = browse(tmp_path / "report.html", f"--screenshot={tmp_path / 'screen.png'}")
    assert console == []
    from PIL import Image

    with Image.open(tmp_path / "screen.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    browse(tmp_path / "report.html", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_it_needs_no_more_than_the_package(folder):
    """No plotting library is loaded for the page itself, and no locale has to be set."""
    code = (
        f"import sys, pathlib; from rtl.page import RunView, page; run = RunView.read(pathlib.Path({str(folder)!r})); "
    )
    code += "page([run]); assert 'matplotlib.pyplot' not in sys.modules"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | plain, check=True)


def test_report_writes_it(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--to", str(tmp_path / "kept")]) == 0
    assert (tmp_path / "kept" / "report.html").read_text() == page([RunView.read(tmp_path / "kept")])
    assert "written: " in capsys.readouterr().out
