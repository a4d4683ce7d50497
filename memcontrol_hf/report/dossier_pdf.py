"""The dossier as a PDF, by fpdf2, with the fonts that come with Matplotlib."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

from .dossier import Dossier, Section

if TYPE_CHECKING:
    from fpdf import FPDF

_GREY, _OPEN = (238, 238, 238), (255, 244, 214)


def check_fpdf() -> None:
    """Raise `ValueError` when the package that writes a PDF is missing."""
    if find_spec("fpdf") is None:
        raise ValueError("a PDF needs fpdf2, which is not installed: pip install 'memcontrol_hf[dossier]'")


def write_pdf(dossier: Dossier, path: Path) -> None:
    """Write the dossier as a PDF of A4 pages, with an outline of its sections."""
    from fpdf import FPDF

    class Pages(FPDF):
        def footer(self) -> None:
            self.set_y(-12)
            self.set_font("DejaVu", size=7)
            self.set_text_color(100)
            self.cell(0, 5, f"{dossier.name}: page {self.page_no()} of {{nb}}. No legal claim is made.", align="C")

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pdf = Pages(format="A4")
    pdf.set_auto_page_break(True, margin=16)
    pdf.add_font("DejaVu", "", fonts / "DejaVuSans.ttf")
    pdf.add_font("DejaVu", "B", fonts / "DejaVuSans-Bold.ttf")
    pdf.set_title(f"Dossier: {dossier.name}")
    pdf.set_lang("en")
    pdf.add_page()
    pdf.set_font("DejaVu", "B", 16)
    pdf.multi_cell(0, 9, f"Dossier: {dossier.name}", new_x="LMARGIN", new_y="NEXT")
    _paragraph(
        pdf,
        "For a data protection officer. Each line names the field of the report, or of what people filled in (facts), "
        "that it comes from. This document repeats what was measured and what people stated; it makes no legal claim.",
    )
    for section in dossier.sections:
        _section(pdf, section)
    pdf.output(str(path))


def _section(pdf: "FPDF", section: Section) -> None:
    if pdf.will_page_break(40):  # a title stays with what follows it
        pdf.add_page()
    pdf.ln(3)
    pdf.start_section(section.title)
    pdf.set_font("DejaVu", "B", 12)
    pdf.multi_cell(0, 7, section.title, new_x="LMARGIN", new_y="NEXT")
    _paragraph(pdf, section.about)
    if section.lines:
        rows = [[line.label, line.text, line.source] for line in section.lines]
        _table(pdf, rows, (27, 51, 22), head=False)
    for caption, rows in section.tables:
        if caption:
            if pdf.will_page_break(25):
                pdf.add_page()
            pdf.ln(2)
            pdf.set_font("DejaVu", "B", 9)
            pdf.multi_cell(0, 6, caption, new_x="LMARGIN", new_y="NEXT")
        columns = len(rows[0])
        _table(pdf, rows, (36, *[64 / (columns - 1)] * (columns - 1)), head=True)


def _table(pdf: "FPDF", rows: list[list[str]], widths: tuple[float, ...], head: bool) -> None:
    from fpdf.fonts import FontFace

    pdf.set_font("DejaVu", size=8)
    pdf.set_text_color(0)
    grey, open_line = FontFace(fill_color=_GREY), FontFace(fill_color=_OPEN)
    with pdf.table(
        col_widths=widths,
        first_row_as_headings=head,
        headings_style=FontFace(emphasis="BOLD", fill_color=_GREY),
        line_height=4,
        padding=1,
        text_align="LEFT",
    ) as table:
        for cells in rows:
            missing = not head and cells[1].startswith(("not tested", "not stated"))
            row = table.row()
            for number, cell in enumerate(cells):
                style = grey if number == 0 and not head else open_line if missing else None
                row.cell(cell, style=style)


def _paragraph(pdf: "FPDF", text: str) -> None:
    pdf.set_font("DejaVu", size=9)
    pdf.set_text_color(0)
    pdf.multi_cell(0, 5, text, align="LEFT", new_x="LMARGIN", new_y="NEXT")
    pdf.ln(1)
