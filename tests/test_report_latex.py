"""tables/*.tex: what LaTeX would trip over."""

from __future__ import annotations

from vlm_pruner_eval.report.sheets.table import Entry, Group, Line, Table

from vlm_pruner_eval.report.writers.latex import latex

HOSTILE = Table(
    "t",
    "50 % of A_1 & B",
    ("method", "score", "words"),
    (
        Group("88.9 % removed", (Line("[x] ~$#^{}\\", (Entry("1.0", ("0.5–1.5",), best=True), Entry("a_b"))),)),
        Group("", (Line("y", (Entry("2.0", ("± 0.1",)), Entry("-0.2", ("-0.3 to 0.0", "p < 0.001")))),)),
    ),
    legend=("4nd² × 2",),
    words=("words",),
)


def test_latex_is_booktabs_with_everything_escaped() -> None:
    lines = latex(HOSTILE, caption="tiny, 12 documents").splitlines()
    assert r"\caption{50 \% of A\_1 \& B. tiny, 12 documents}" in lines
    assert r"\begin{tabular}{lrl}" in lines
    assert r"\multicolumn{3}{l}{\emph{88.9 \% removed}} \\" in lines
    # a row that begins with [ would be read as the argument of the line break before it
    hostile = r"{[}x{]} \textasciitilde{}\$\#\textasciicircum{}\{\}\textbackslash{}"
    assert rf"{hostile} & \textbf{{1.0}} {{\scriptsize [0.5--1.5]}} & a\_b \\" in lines
    assert r"y & 2.0 {\scriptsize $\pm$ 0.1} & -0.2 {\scriptsize [-0.3 to 0.0; p $<$ 0.001]} \\" in lines
    assert r"\par\smallskip\footnotesize 4nd$^2$ $\times$ 2" in lines
    assert [line for line in lines if line in (r"\toprule", r"\midrule", r"\bottomrule")] == [
        r"\toprule",
        r"\midrule",
        r"\midrule",
        r"\bottomrule",
    ]
