"""The figures in README and the documentation are those of the committed results, and every script is run for them."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
HELPERS = {"timing", "cached_epochs", "render_tables", "run_all"}
CHECKS = {"kill_resume", "kill_cache_build"}  # run by tests of training
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in HELPERS | CHECKS)


@pytest.fixture
def benchmark(monkeypatch):
    """A module of the folder by its name, as one finds it when it is run as a script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "set")  # or the process would start itself again
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "set")
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def test_no_helper_of_the_tests_is_named_as_a_script():
    assert not {path.stem for path in Path(__file__).parent.glob("*.py")} & {
        path.stem for path in BENCHMARKS.glob("*.py")
    }


def test_every_script_is_in_the_loop(benchmark):
    assert sorted(benchmark("run_all").SCRIPTS) == SCRIPTS


def test_pages_tell_what_was_measured(benchmark):
    tables = benchmark("render_tables")
    assert tables.render_pages(write=False) == []
    marked = [match[1] for page in tables.PAGES for match in tables.MARKED.finditer(page.read_text(encoding="utf-8"))]
    assert sorted(marked) == sorted([*tables.LISTS, *tables.GRIDS, *tables.FIGURES])  # each once
    ends = [re.findall(r"<!-- /?bench:", page.read_text(encoding="utf-8")) for page in tables.PAGES]
    assert sum(map(len, ends)) == 2 * len(marked)


def test_another_measurement_gives_another_page(benchmark, tmp_path, monkeypatch):
    tables = benchmark("render_tables")
    for path in tables.RESULTS.glob("*.json"):
        report = json.loads(path.read_text(encoding="utf-8"))
        for row in report["rows"]:
            row["ratio"] *= 2
        (tmp_path / path.name).write_text(json.dumps(report), encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name in [*tables.LISTS, *tables.GRIDS, *tables.FIGURES]:
        page = f"before <!-- bench:{name} -->1.00<!-- /bench:{name} --> after"
        doubled = tables.render(page)
        assert tables.render(doubled) == doubled and doubled.endswith("after")
        with monkeypatch.context() as original:
            original.setattr(tables, "RESULTS", BENCHMARKS / "results")
            assert tables.render(page) not in (page, doubled)
    with pytest.raises(ValueError, match="unknown table 'speed'; known:"):
        tables.render("<!-- bench:speed --><!-- /bench:speed -->")


def test_results_tell_their_machine(benchmark, tmp_path, monkeypatch):
    timing = benchmark("timing")
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    timing.write_results("one", [timing.row("ours / theirs", 0.5, "<= 1.0")])
    report = json.loads((tmp_path / "one.json").read_text())
    assert report["rows"] == [{"what": "ours / theirs", "ratio": 0.5, "demand": "<= 1.0", "held": True}]
    assert report["versions"]["torch"] == torch.__version__ and report["threads"] == torch.get_num_threads()
    assert report["device"].startswith("CPU") and {"cores", "date", "seconds"} <= report.keys()


def test_a_script_that_fails_does_not_stop_the_others(benchmark, tmp_path, monkeypatch, capfd):
    run_all = benchmark("run_all")
    for name, text in {"first": "raise SystemExit(3)", "second": "print('second ran')"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(run_all, "FOLDER", tmp_path)
    monkeypatch.setattr(run_all, "SCRIPTS", ("first", "second"))
    monkeypatch.setattr(run_all, "render_pages", lambda: ["README.md"])
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    assert run_all.main() == 1
    told = capfd.readouterr()
    assert "[1/2] first: 0 s, exit status 3" in told.out and "second ran" in told.out and "README.md" in told.out
    assert told.err == "failed: first\n"
    monkeypatch.setattr(sys, "argv", ["run_all.py", "second"])
    assert run_all.main() == 0
    monkeypatch.setattr(sys, "argv", ["run_all.py", "third"])
    with pytest.raises(SystemExit):
        run_all.main()


@pytest.mark.parametrize("name", sorted([*SCRIPTS, *CHECKS]))
def test_every_script_explains_itself(benchmark, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        benchmark(name).main()
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert f"python benchmarks/{name}.py" in told and (name in CHECKS or "--tiny" in told)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_runs_small(benchmark, name, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark("timing"), "RESULTS", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny"])
    benchmark(name).main()
    assert not any(tmp_path.iterdir())
