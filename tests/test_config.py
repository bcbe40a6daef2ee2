"""Settings: who wins, and how every mistake ends."""

import ast
import contextlib
import os
import runpy
import sys
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import config
from bench import BenchConfig
from cell_bridge import CellConfig
from sample import SampleConfig
from train import TrainConfig


@dataclass(frozen=True)
class Small:
    # numbers
    width: int = 4  # neurons
    rate: float = 0.5  # a share
    name: str = "sam"  # a word
    fast: bool = False  # a switch


def write(tmp_path, text):
    path = tmp_path / "config.py"
    path.write_text(text)
    return str(path)


def test_the_last_wins(tmp_path):
    path = write(tmp_path, "width = 2 * 4\nrate = 1\n")
    assert config.load(Small, []) == Small()
    assert config.load(Small, [path]) == Small(width=8, rate=1.0)
    # also when the file comes after: the command line is the strongest
    assert config.load(Small, ["--width=16", path]) == Small(width=16, rate=1.0)
    assert config.load(Small, ["--fast"]) == Small(fast=True)  # a switch needs no value
    assert config.load(Small, [path, "--fast=True", "--name=3"]) == Small(8, 1.0, "3", True)
    assert config.load(Small, [path, "--width=1", "--width=2"]).width == 2


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--width 8 --rate -1", Small(width=8, rate=-1.0)),
        ("--fast --name hi", Small(name="hi", fast=True)),  # a switch takes no word but these two
        ("--fast True --width 8", Small(width=8, fast=True)),
        ("--fast False", Small()),
        ("--fast CONFIG --rate 2", Small(width=16, rate=2.0, fast=True)),
        ("--rate 2 CONFIG --name=-", Small(width=16, rate=2.0, name="-")),
        ("--name --fast", "--name has no value; write --name=VALUE"),
        ("CONFIG --name", "--name has no value; write --name=VALUE"),
        ("--widht 8", "did you mean 'width'"),
        ("--widht", "did you mean 'width'"),
        ("--width CONFIG", "width must be of type int, got"),
    ],
)
def test_a_value_may_follow_its_name(argv, expected, tmp_path, capsys):
    path = write(tmp_path, "width = 16")
    argv = [path if word == "CONFIG" else word for word in argv.split()]
    if isinstance(expected, Small):
        assert config.load(Small, argv) == expected
    else:
        with pytest.raises(SystemExit):
            config.load(Small, argv)
        assert expected in capsys.readouterr().err
    assert config.load(Small, ["--name", "", "--rate", "1e-3"]) == Small(name="", rate=1e-3)


def test_a_config_file_may_import_and_compute(tmp_path):
    lines = """
import math
from dataclasses import dataclass
import numpy as np
def half(x):
    return x / 2
class Plan:
    base = 8
_pieces = [1, 2]
fast = any(x > 1 for x in _pieces)
width = Plan.base * len(_pieces)
rate = half(np.float32(0.5) * math.sqrt(4))
"""
    assert config.load(Small, [write(tmp_path, lines)]) == Small(width=16, rate=0.5, fast=True)


@pytest.mark.parametrize(
    "argv, file, expected",
    [
        (["--widht=3"], None, "did you mean 'width'"),
        ([], "widht = 3", "did you mean 'width'"),
        (["--width=3.5"], None, "width must be of type int, got 3.5"),
        (["--width=many"], None, "width must be of type int"),
        (["--fast=1"], None, "fast must be of type bool"),
        ([], "name = 3", "name must be of type str"),
        ([], "width = True", "width must be of type int"),
        (["--width"], None, "has no value"),
        (["missing.py"], None, "cannot read the config file missing.py"),
        ([], "width = (", "SyntaxError"),
        ([], "width = 1 / 0", "ZeroDivisionError"),
        ([], "import nothing.here", "ModuleNotFoundError"),
        ([], "def rate(): pass", "rate must be of type float, got <function"),  # not a helper
        ([], "for i in range(3): width = i", "if it is a helper, name it _i"),
        ([], "rate = 10**400", "rate must fit into 64 bits"),
        (["--rate=1e999"], None, "rate must be finite"),
        (["--width={[]: 1}"], None, "width must be of type int"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(argv, file, expected, tmp_path, capsys):
    if file is not None:
        argv = [write(tmp_path, file), *argv]
    with pytest.raises(SystemExit) as stopped:
        config.load(Small, argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert expected in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("cls", [Small, TrainConfig, SampleConfig, BenchConfig])
def test_help_lists_every_setting_with_its_comment(cls, capsys):
    with pytest.raises(SystemExit) as stopped:
        config.load(cls, ["--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for f in fields(cls):
        (line,) = [x for x in lines if x.startswith(f"  --{f.name}=")]
        default, comment = line.split("=", 1)[1].split("  # ")
        assert ast.literal_eval(default) == f.default and len(comment) > 5


@pytest.mark.parametrize(
    "setting, expected",
    [
        ("--surrogate=step", "surrogate must be one of"),
        ("--block=lstm", "block must be one of"),
        ("--rec_heads=7", "n_hidden 512 must be a multiple of rec_heads 7"),
        ("--beta_high=1.5", "beta_high must be 1e-06 to 0.999999, got 1.5"),
        ("--block=snn --n_head=7", "n_hidden 512 must be a multiple of n_head 7"),
        ("--rehearse=1.0", "rehearse must be 0 to 0.99"),
        ("--eval_interval=0", "eval_interval must be at least 1"),
        ("--lr=-1.0", "lr must be at least 0, got -1.0"),
        ("--phases=novels:64", "phases must be name:length"),
        ("--phases=words", "phases must be name:length"),
        ("--n_layer=0", "n_layer must be 1 to 1000"),
        ("--tokens_per_step=4", "tokens_per_step must hold"),
    ],
)
def test_values_that_make_no_sense(setting, expected, capsys):
    with pytest.raises(SystemExit):
        config.load(TrainConfig, setting.split())
    assert expected in capsys.readouterr().err


def test_paths_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    c = config.load(SampleConfig, ["--ckpt=~/a.pt", "--prompt=~/a.pt"])
    assert (c.ckpt, c.prompt) == ("/home/me/a.pt", "~/a.pt")
    for cls in (TrainConfig, SampleConfig, CellConfig):
        for path in set(config.PATHS.split()) & {f.name for f in fields(cls)}:
            assert config.checked(cls, path, "~/x", "") == "/home/me/x"


def test_a_config_that_is_no_python_file_is_not_run(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "stranger.pt", "w") as archive:  # as checkpoints are
        archive.writestr("__main__.py", "print('it ran')")
    with pytest.raises(SystemExit, match="2"):
        config.load(Small, [str(tmp_path / "stranger.pt")])
    said = capsys.readouterr()
    assert "must end in .py" in said.err and not said.out


def test_writable_is_for_all_processes_of_a_run(tmp_path, monkeypatch):
    """Another one may have removed the new file by then."""
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda p, **more: (os.remove(p), unlink(p, **more)))
    assert config.writable(tmp_path / "a.json") and not (tmp_path / "a.json").exists()


def test_writable_makes_the_folder_and_keeps_the_file(tmp_path):
    path = tmp_path / "new" / "result.json"
    assert config.writable(path) == path and path.parent.is_dir() and not path.exists()
    path.write_text("kept")
    config.writable(path)
    assert path.read_text() == "kept"
    for wrong, why in ((path / "x.json", "exists|directory"), (tmp_path, "directory")):
        with pytest.raises(ValueError, match=f"cannot write {wrong}: .*({why})"):
            config.writable(wrong)


def test_a_closed_pipe_ends_without_a_word(monkeypatch):
    """Also if only the last flush notices it."""
    reader, writer = os.pipe()
    os.close(reader)
    lost = []
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    monkeypatch.setattr(os, "dup2", lambda old, new: lost.append(new))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(Path(config.__file__).with_name("lif.py")), run_name="__main__")
    assert stopped.value.code == 141 and lost == [1]
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.close()
