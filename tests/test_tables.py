"""The tables of the pages are those of the committed rows, and a table without rows says so."""

import importlib
import re
import shutil
import sys

import pandas as pd
import pytest

from conftest import PACKAGE

ROOT = PACKAGE.parent


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    return importlib.import_module("tables")


def run_check(tables, monkeypatch, *pages) -> None:
    monkeypatch.setattr(tables, "PAGES", pages)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    tables.main()


def test_pages_hold_the_tables_of_the_rows(tables, monkeypatch, capsys):
    run_check(tables, monkeypatch, *tables.PAGES)
    assert capsys.readouterr().out == "Every table is that of its rows.\n"
    texts = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    assert sorted(re.findall(r"<!-- table: ([\w-]+) -->", texts)) == sorted(tables.TABLES)


def test_a_changed_number_is_caught(tables, monkeypatch, capsys, tmp_path):
    page = tmp_path / "README.md"
    right = tables.PAGES[0].read_text(encoding="utf-8")
    wrong = re.sub(r"\d % \|\n", "x % |\n", right, count=1)
    assert wrong != right
    page.write_text(wrong, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        run_check(tables, monkeypatch, page)
    assert stopped.value.code == 1
    assert capsys.readouterr().out == "README.md: readme\n"
    assert page.read_text(encoding="utf-8") == wrong
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    assert page.read_text(encoding="utf-8") == right


def test_a_changed_row_is_caught(tables, monkeypatch, tmp_path):
    folder = tmp_path / "held_out_quick"
    shutil.copytree(tables.held_out_tables.QUICK, folder)
    path = folder / "student-0--xstest.csv"
    pd.read_csv(path).assign(declines=1).to_csv(path, index=False)
    monkeypatch.setattr(tables.held_out_tables, "QUICK", folder)
    text = tables.PAGES[0].read_text(encoding="utf-8")
    assert tables.rewritten(text, "README.md")[1] == ["readme"]


def test_a_table_that_cannot_be_made_is_an_error(tables):
    with pytest.raises(SystemExit, match=r"no function makes: other"):
        tables.rewritten("<!-- table: other -->\n<!-- end -->", "a page")
    with pytest.raises(SystemExit, match="has no <!-- end -->"):
        tables.rewritten("<!-- table: demo -->\n", "a page")


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_a_table_of_numbers_has_rows_or_says_that_it_has_none(tables, name):
    """In the section before a table, since the last table, stands "rows not kept"."""
    text = tables.MARKED.sub("\n<!-- made -->\n", (ROOT / name).read_text(encoding="utf-8"))
    parts = re.split(r"((?:^\|.*\n)+)", text, flags=re.M)
    for before, table in zip(parts[::2], parts[1::2], strict=False):
        cells = [cell for line in table.splitlines()[2:] for cell in line.split("|")[2:]]
        if any(re.match(r" *\**\d[\d.]*( %|\*| |$)", cell) for cell in cells):
            assert re.search(r"rows\s+not\s+kept", before, re.I), table.splitlines()[2]
