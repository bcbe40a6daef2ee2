"""RESULTS.md and the pictures are what results/ says; a mistake in the template is one line."""

import json
import re
import sys
from pathlib import Path

import pytest

import bench
from experiments import report

ROOT = Path(__file__).parent.parent
LOG = [
    {"phase": "a", "tokens": 0, "tokens_per_s": 0.0, "bpb": 8.0},
    {"phase": "a", "tokens": 10, "tokens_per_s": 100.0, "bpb": 4.0},
    {"phase": "b", "tokens": 20, "tokens_per_s": 3000.0, "bpb": 2.0, "rate": [0.1, 0.2]}
    | {"synops": 20.0, "synapses": 80},
]  # fmt: skip
FIRST = {"parameters": 6_050_000, "log": LOG, "gain": 0.0004, "date": "2026-01-02T03:04:05"}
FIRST |= {"commit": "0123456789", "command": "train.py", "ms": {"median_ms": 1.25, "ratio": 2}}
SECOND = FIRST | {"parameters": 1_070_000_000, "log": [LOG[-1] | {"bpb": 2.5, "synapses": 0}]}


@pytest.fixture
def render(tmp_path, monkeypatch):
    """Text of a template -> that of RESULTS.md, with the results `first` and `second`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    for name, result in (("first", FIRST), ("second", SECOND)):
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(result))

    def results(text):
        (tmp_path / "results" / "template.md").write_text(text)
        return report.results()

    return results


def test_results_are_those_of_today(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert report.results() == (ROOT / "RESULTS.md").read_text(), "run: python bench.py report"


@pytest.mark.parametrize(
    "value, text",
    {
        "first | parameters": "6.05M",
        "second | parameters": "1.07B",
        "first | bpb": "2.000",
        "first/log/a | bpb:.1f": "4.0",  # the last line of the phase
        "first/log/-2 | tokens:03d": "010",
        "first | share": "25%",  # triggered of all, not the other way round
        "second | share": "",  # floats have none
        "first | speed": "1,550",  # median, without the line that has trained nothing
        "first | firing": "15.0%",
        "first | change": "0.000",  # neither +0.000 nor -0.000
        "first/ms | time": "1.2 (2.0)",
        "first & second | 2.bpb": "2.500",
        "first & second | 3.bpb": "",
        "second & first | above": "25.0%",
        "first | none?:.2f": "",
        "first | commit:": "0123456789",
    }.items(),
)
def test_a_value(render, value, text):
    assert render(f"x {{{value}}} y\n").split("\n")[0] == f"x {text} y"


def test_a_table_and_the_list_of_files(render):
    table = "|= bpb | 2.log/-1/tokens:d = n\n%c |: not yet | third\n|: one, `a` | first & second\n"
    assert render(table).split("\n") == [
        "| | held out, bits/byte | n |", "|---|---|---|", "| one, `a` | 2.000 | 20 |", "",
        "- `first`, 2026-01-02, 0123456: `train.py`",
        "- `second`, 2026-01-02, 0123456: `train.py`", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row, columns, said",
    [
        ("third", "bpb", "results/third.json is missing"),
        ("first & third", "2.bpb", "results/third.json is missing"),
        ("broken", "bpb", "results/broken.json is no JSON"),
        ("first/log/c", "bpb:.3f", "results/first.json has no key log/c"),
        ("first & second/none", "2.bpb", "results/second.json has no key none"),
        ("first", "log/7/bpb:.3f", "results/first.json has no key log/7"),
        ("first", "bpp", "'bpp' is neither PATH:FORMAT nor one of parameters,"),
        ("first", "log:.3f", "format"),
        ("first", "log/0 | bpb", "PATH:FORMAT"),
    ],
)
def test_a_mistake_is_one_line_that_names_row_and_file(render, row, columns, said):
    Path("results/broken.json").write_text("{")
    with pytest.raises(ValueError) as error:
        render(f"# Title\n|= {columns}\n|: the model | {row}\n")
    where = "line 3, '|: the model'" if "PATH" not in said else "line 2, '|="
    assert where in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_a_row_outside_a_table_is_a_mistake(render):
    with pytest.raises(ValueError, match="line 3.*a row is"):
        render("|= bpb\n\n|: the model | first\n")


def test_the_command(render, monkeypatch, capsys):
    """Without matplotlib the tables alone; after a mistake RESULTS.md is still there."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    render("{first | bpb}")
    bench.main(["report"])
    text = Path("RESULTS.md").read_text()
    assert text.startswith("2.000\n") and "pip install matplotlib" in capsys.readouterr().err
    for argv, template in ((["report"], "{first | bpp}"), (["report", "--save=True"], "")):
        Path("results/template.md").write_text(template)
        with pytest.raises(SystemExit) as stopped:
            bench.main(argv)
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
        assert Path("RESULTS.md").read_text() == text


# ---- pictures ----------------------------------------------------------------------------------


def test_documents_show_the_pictures_that_there_are():
    files = {path.name for path in (ROOT / "assets").iterdir()}
    assert files == {f"{name}.png" for name in [*report.PICTURES, "page"]}
    for name in files:
        image, most = (ROOT / "assets" / name).read_bytes(), 60_000 if name != "page.png" else 2e5
        assert image.startswith(b"\x89PNG") and len(image) <= most, name
    text = "".join(path.read_text() for path in ROOT.glob("*.md"))
    assert set(re.findall(r"\(assets/([^)]+)\)", text)) == files


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Name of a picture -> its figure, drawn from results/ and saved."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)

    def draw(name):
        figures, save = [], report.save
        monkeypatch.setattr(report, "save", lambda f, path: figures.append(f) or save(f, path))
        report.PICTURES[name](tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "x.png").stat().st_size <= 60_000
        for axes in figures[0].axes:
            assert axes.get_title() and axes.get_ylabel(), name
        assert figures[0].legends or figures[0].axes[0].get_legend()
        return figures[0]

    return draw


def test_picture_of_the_losses(drawn):
    stories, nursery = drawn("loss").axes
    for axes in (stories, nursery):
        assert "tokens, millions" in axes.get_xlabel()
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in stories.lines]
    log = [report.source(f"{file}/log/-1") for _, file, *_ in report.RUNS]
    assert ends == [(line["tokens"] / 1e6, line["bpb"]) for line in log]
    looks = [(line.get_linestyle(), line.get_marker()) for line in stories.lines]
    assert len(set(looks)) == len(looks), "not told apart in grey"
    entropy = report.source("nursery_sam_6m/log/-1/entropy_bpb")
    assert set(nursery.lines[1].get_ydata()) == {entropy}
    assert min(nursery.lines[0].get_ydata()) > entropy


def test_picture_of_synops(drawn):
    (axes,) = drawn("synops").axes
    curve, *levels = axes.lines
    assert sorted(curve.get_xdata()) == list(curve.get_xdata()) and 5 < curve.get_xdata()[0] < 10
    assert curve.get_ydata()[1] == report.source("curve_snn_0.1/log/-1/bpb")
    files = {"transformer": "curve_gpt", "float control of snn": "curve_snn_twin"}
    for level in levels:
        bpb = report.source(f"{files.pop(level.get_label())}/log/-1/bpb")
        assert set(level.get_ydata()) == {bpb}


def test_picture_of_speed(drawn):
    training, generating = drawn("speed").axes
    assert "tokens/s" in training.get_ylabel() and "ms/token" in generating.get_ylabel()
    heights = [bar.get_height() for bar in training.patches]
    for file, got in (("train_sam_6m_cpu", heights[:3]), ("train_sam_6m_cpu_float32", heights[3:])):
        assert got == [x["tokens_per_s"] for x in report.source(f"{file}/contestants").values()]
    names = [label.get_text().replace("\n", " ") for label in generating.get_xticklabels()]
    rows = report.source("generate_snn_1b_cpu_compiled/contestants")
    assert names == ["ours, bfloat16", *[*rows][1:]]
    heights = [bar.get_height() for bar in generating.patches]
    assert heights == [row["late_ms_per_token"] for row in rows.values()]
