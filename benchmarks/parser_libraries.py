"""Parser libraries side by side: processor seconds, memory and text of PDF and HTML on real collections.

    python benchmarks/parser_libraries.py

PDF is the ten filings of `$RAGKIT_DATA/sec_10q`, HTML the pages of Debian's `postgresql-doc-15`. Every library runs in
a process of its own, over all files; those that are not installed are left out. Two columns say what speed does not:
`numbers` is the share of the amounts printed in the files' statements (a label and its row of figures on one line)
that come out on one line, for PDF, and `words` the share of 2,000 words from the pages' paragraphs that come out whole.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import data_folder, markdown_table, write_result

HTML_FOLDER = Path("/usr/share/doc/postgresql-doc-15/html")
ROUNDS = 2
# Rows of statements as they stand on the printed page: company and quarter, page, a stretch that must be one line.
STATEMENT_ROWS = (
    ("2022 Q3 AAPL", "Total net sales 82,959 81,434 304,182 282,457"),
    ("2022 Q3 AAPL", "Research and development 6,797 5,717 19,490 16,142"),
    ("2022 Q3 AAPL", "Operating income 23,076 24,126 94,543 85,163"),
    ("2022 Q3 INTC", "Cost of sales 8,803 8,446 27,646 25,690"),
    ("2022 Q3 INTC", "Gross margin 6,535 10,746 21,366 32,806"),
    ("2022 Q3 INTC", "Operating expenses 6,710 5,519 17,900 18,339"),
    ("2022 Q3 NVDA", "Accounts receivable, net 4,908 4,650"),
    ("2022 Q3 NVDA", "Total current liabilities 6,855 4,335"),
    ("2022 Q3 AMZN", "Total other comprehensive income (loss) (550) (2,333) (895) (5,739)"),
    ("2023 Q1 MSFT", "Total current assets 157,823 169,684"),
    ("2023 Q1 MSFT", "Retained earnings 99,368 84,281"),
    ("2023 Q1 MSFT", "Total liabilities 181,416 198,298"),
)


def pdf_ragkit(path: Path) -> str:
    """Return the text of a PDF by ragkit's own reader (PDFium)."""
    from ragkit.readers.base import ParseContext, ParsedDocument
    from ragkit.readers.pdf import PdfReader

    return "".join(item.text for item in PdfReader().read(path, ParseContext()) if isinstance(item, ParsedDocument))


def pdf_pypdfium2(path: Path) -> str:
    import pypdfium2

    with pypdfium2.PdfDocument(path) as pdf:
        return "\n".join(page.get_textpage().get_text_bounded() for page in pdf)


def pdf_pypdf(path: Path) -> str:
    import pypdf

    return "\n".join(page.extract_text() for page in pypdf.PdfReader(path).pages)


def pdf_pymupdf(path: Path) -> str:
    import pymupdf

    with pymupdf.open(path) as pdf:
        return "\n".join(page.get_text() for page in pdf)


def html_ragkit(path: Path) -> str:
    """Return the text of a page by ragkit's own reader (lexbor)."""
    from ragkit.readers.base import ParseContext, ParsedDocument
    from ragkit.readers.html import HtmlReader

    return "".join(item.text for item in HtmlReader().read(path, ParseContext()) if isinstance(item, ParsedDocument))


def html_selectolax(path: Path) -> str:
    from selectolax.lexbor import LexborHTMLParser

    body = LexborHTMLParser(path.read_bytes()).body
    return body.text(separator=" ") if body else ""


def html_lxml(path: Path) -> str:
    from lxml import html

    return " ".join(html.fromstring(path.read_bytes()).itertext())


def html_trafilatura(path: Path) -> str:
    import trafilatura

    return trafilatura.extract(path.read_bytes().decode(), include_tables=True) or ""


LIBRARIES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "pdf: ragkit (pypdfium2)": ("pypdfium2", pdf_ragkit),
    "pdf: pypdfium2 alone": ("pypdfium2", pdf_pypdfium2),
    "pdf: pypdf": ("pypdf", pdf_pypdf),
    "pdf: pymupdf": ("pymupdf", pdf_pymupdf),
    "html: ragkit (selectolax)": ("selectolax", html_ragkit),
    "html: selectolax alone": ("selectolax", html_selectolax),
    "html: lxml alone": ("lxml", html_lxml),
    "html: trafilatura": ("trafilatura", html_trafilatura),
}


def files_of(name: str) -> list[Path]:
    """Return the files that a library reads."""
    if name.startswith("html"):
        return sorted(HTML_FOLDER.glob("*.html"))
    folder = data_folder("sec_10q")
    return sorted(folder.glob("*.pdf")) if folder else []


def measure(name: str) -> dict[str, Any]:
    """Return what one library does with its files; runs in a process of its own."""
    function = LIBRARIES[name][1]
    files = files_of(name)
    texts: dict[str, str] = {}
    failed = []
    started = time.process_time()
    for path in files:
        try:
            texts[path.stem] = function(path)
        except Exception as error:
            failed.append(f"{path.name}: {type(error).__name__}: {error}")
    seconds = time.process_time() - started
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    quality = statement_share(texts) if name.startswith("pdf") else word_share(texts, files)
    characters = sum(map(len, texts.values()))
    return {"cpu_s": seconds, "peak_mb": peak_mb, "characters": characters, "failed": failed, "quality": quality}


def statement_share(texts: dict[str, str]) -> float:
    """Return the share of `STATEMENT_ROWS` that stand on one line, dollar signs and blanks aside."""
    found = 0
    for stem, row in STATEMENT_ROWS:
        lines = (" ".join(line.replace("$", " ").split()) for line in texts.get(stem, "").splitlines())
        found += any(row in line for line in lines)
    return found / len(STATEMENT_ROWS)


def word_share(texts: dict[str, str], files: list[Path]) -> float:
    """Return the share of pairs of neighbouring words of paragraphs that are neighbours in the text too."""
    draw = random.Random(0)
    found = total = 0
    for path in draw.sample(files, min(200, len(files))):
        paragraphs = re.findall(r"<p>([^<]{40,})</p>", path.read_text("utf-8"))
        text = " ".join(texts.get(path.stem, "").split())
        for paragraph in draw.sample(paragraphs, min(10, len(paragraphs))):
            words = paragraph.split()
            place = draw.randrange(len(words) - 1)
            pair = " ".join(words[place : place + 2])
            if "&" not in pair:
                total += 1
                found += pair in text
    return found / total if total else 0.0


def main() -> None:
    """Measure every library that is installed, print the table and keep the raw numbers."""
    rows, raw = [], {}
    for name, (package, _) in LIBRARIES.items():
        if importlib.util.find_spec(package) is None or not files_of(name):
            print(f"left out: {name} ({package} or its data is not there)", file=sys.stderr)
            continue
        runs = [json.loads(subprocess.check_output([sys.executable, __file__, name], text=True)) for _ in range(ROUNDS)]
        best = min(runs, key=lambda run: run["cpu_s"])
        raw[name] = runs
        rows.append(
            {
                "library": name,
                "files": len(files_of(name)),
                "CPU s": round(best["cpu_s"], 2),
                "peak MB": round(best["peak_mb"]),
                "M characters": round(best["characters"] / 1e6, 2),
                "rows or words whole, %": round(100 * best["quality"], 1),
                "files failed": len(best["failed"]),
            }
        )
    if not rows:
        raise SystemExit("nothing to measure: set RAGKIT_DATA, or install Debian's postgresql-doc-15")
    print(markdown_table(rows, list(rows[0])))
    write_result("parser_libraries", {"rows": rows, "raw": raw})


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
