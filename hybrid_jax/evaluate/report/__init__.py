"""The report of an evaluation: tables (Markdown, CSV, LaTeX), pictures, and one page that opens without a network.

report.md, report.html   the same page twice; pictures are inside the HTML file
table.tex                the first table
results.csv              every number with its interval, one per line
*.png                    the pictures
"""

from hybrid_jax.evaluate.report.page import write_report
from hybrid_jax.evaluate.report.tables import first_table, notes

__all__ = ["first_table", "notes", "write_report"]
